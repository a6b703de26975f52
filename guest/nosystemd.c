/*
 * A libsystemd.so.0 for a guest without systemd: every function says that it is not there.
 *
 * Why: crun links libsystemd for its systemd cgroup manager, which the agent never uses. The real
 * library brings libgcrypt, liblzma, libzstd and liblz4 along, and loading these five doubles the
 * time that each run of crun takes in an emulated guest.
 * Invariants: all the symbols that crun imports, 1.8 to 1.28 (checked when the image is built), under the
 * versions that it asks for (nosystemd.map); each returns -ENOSYS, the ones that free return NULL.
 */
#include <errno.h>
#include <stddef.h>

#define ABSENT(name) int name(void) { return -ENOSYS; }
#define NOTHING(name) void *name(void) { return NULL; }

ABSENT(sd_bus_call)
ABSENT(sd_bus_default_system)
ABSENT(sd_bus_default_user)
ABSENT(sd_bus_error_get_errno)
ABSENT(sd_bus_match_signal_async)
ABSENT(sd_bus_message_append)
ABSENT(sd_bus_message_append_array)
ABSENT(sd_bus_message_append_basic)
ABSENT(sd_bus_message_append_strv)
ABSENT(sd_bus_message_close_container)
ABSENT(sd_bus_message_new_method_call)
ABSENT(sd_bus_message_open_container)
ABSENT(sd_bus_message_read)
ABSENT(sd_bus_process)
ABSENT(sd_bus_wait)
ABSENT(sd_journal_send_with_location)
ABSENT(sd_notify)
ABSENT(sd_notify_barrier)
NOTHING(sd_bus_error_free)
NOTHING(sd_bus_message_unref)
NOTHING(sd_bus_unref)
