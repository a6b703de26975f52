/* The first process of the guest: from an initramfs of one megabyte to the agent as PID 1.
 *
 * What: loads the few kernel modules without which there is no root disk and no vsock, mounts the
 * root image read-only, gives it the file systems that a container guest expects, makes it `/` and
 * becomes its init (our agent). The modules that only containers need are loaded from the image by
 * a child of the lowest scheduling class, in the time in which the agent waits for its disk.
 * Why C: the same as a busybox script takes twice as long under an emulated CPU (docs/guest.md).
 * Invariants: it never returns and never sleeps for luck. What it cannot do without ends in one line
 * on the console beginning with "guest-init: " and in the machine being switched off; what it can do
 * without is one line and no more.
 *
 * Kernel command line: root= (a path below /dev; required), rootfstype= (ext4), rootflags=, rw, and
 * init= (/sbin/init; a shell for people: init=/bin/sh).
 */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <net/if.h>
#include <poll.h>
#include <sched.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/inotify.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#define ROOT "/newroot"
#define ROOT_DEVICE_SECONDS 5
#define EARLY_MODULES "/modules/early"       /* in the initramfs, paths in loading order */
#define LATE_MODULES "/lib/modules/late"     /* in the image, likewise */

static void say(const char *format, ...)
{
    char line[512] = "guest-init: ";
    size_t used = strlen(line);
    va_list arguments;

    va_start(arguments, format);
    vsnprintf(line + used, sizeof line - used - 1, format, arguments);
    va_end(arguments);
    strcat(line, "\n");
    if (write(STDERR_FILENO, line, strlen(line)) < 0)
        return; /* no console: nobody to tell */
}

/* Say why, wait until the console has it, and switch the machine off. */
#define die(...) do { say(__VA_ARGS__); power_off(); } while (0)

/* A machine without ACPI's switch would halt for ever instead of going off: its VMM says reboot=k (or
 * any other way), and ends when the guest reboots. */
static int can_be_switched_off = 1;

static void __attribute__((noreturn)) power_off(void)
{
    tcdrain(STDERR_FILENO);
    sync();
    if (can_be_switched_off)
        reboot(RB_POWER_OFF);
    reboot(RB_AUTOBOOT); /* VMMs end when the guest reboots: QEMU runs with -no-reboot */
    for (;;)
        pause();
}

static void mount_at(const char *type, const char *where, unsigned long flags, const char *options)
{
    if (mount(type, where, type, flags, options) != 0)
        say("cannot mount %s on %s: %s", type, where, strerror(errno));
}

static void load_module(const char *path)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);

    if (fd < 0 || (syscall(SYS_finit_module, fd, "", 0) != 0 && errno != EEXIST))
        say("cannot load the module %s: %s", path, strerror(errno));
    if (fd >= 0)
        close(fd);
}

static void load_modules(const char *list)
{
    char path[256];
    FILE *file = fopen(list, "re");

    if (file == NULL) {
        say("cannot read %s: %s", list, strerror(errno));
        return;
    }
    while (fgets(path, sizeof path, file) != NULL) {
        path[strcspn(path, "\n")] = '\0';
        if (path[0] != '\0')
            load_module(path);
    }
    fclose(file);
}

/* ---- the kernel command line ---------------------------------------------------------------- */

static char command_line[4096];

static void read_command_line(void)
{
    int fd = open("/proc/cmdline", O_RDONLY | O_CLOEXEC);
    ssize_t length = fd < 0 ? -1 : read(fd, command_line, sizeof command_line - 1);

    if (length < 0)
        die("cannot read /proc/cmdline: %s", strerror(errno));
    close(fd);
    command_line[length] = '\0';
    can_be_switched_off = strstr(command_line, "reboot=k") == NULL;
}

/* The value of the last `name=` (the kernel's own rule), or the fallback. Bare words match with "". */
static const char *argument(const char *name, const char *fallback)
{
    static char words[sizeof command_line], values[8][256];
    static int used;
    const char *found = NULL;
    size_t length = strlen(name);

    memcpy(words, command_line, sizeof words);
    for (char *word = strtok(words, " \t\n"); word != NULL; word = strtok(NULL, " \t\n")) {
        if (strncmp(word, name, length) != 0)
            continue;
        if (word[length] == '=')
            found = word + length + 1;
        else if (word[length] == '\0')
            found = "";
    }
    if (found == NULL)
        return fallback;
    char *value = values[used++ % 8];
    snprintf(value, sizeof values[0], "%s", found);
    return value;
}

/* ---- the root file system ------------------------------------------------------------------- */

static long milliseconds(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000L + now.tv_nsec / 1000000L;
}

/* Return when `device` exists: devtmpfs announces each new node to inotify, so nothing is polled. */
static void wait_for_device(const char *device)
{
    char directory[256], events[4096] __attribute__((aligned(8)));
    long deadline = milliseconds() + ROOT_DEVICE_SECONDS * 1000L;
    int watcher = inotify_init1(IN_CLOEXEC | IN_NONBLOCK);

    snprintf(directory, sizeof directory, "%s", device);
    *strrchr(directory, '/') = '\0';
    if (watcher < 0 || inotify_add_watch(watcher, directory, IN_CREATE | IN_MOVED_TO) < 0)
        die("cannot watch %s: %s", directory, strerror(errno));
    while (access(device, F_OK) != 0) {
        struct pollfd ready = {.fd = watcher, .events = POLLIN};
        long left = deadline - milliseconds();

        if (left <= 0)
            die("the root device %s did not appear in %d s; is it on the VMM's command line, and is its"
                " driver a module of the initramfs?", device, ROOT_DEVICE_SECONDS);
        if (poll(&ready, 1, (int)left) > 0 && read(watcher, events, sizeof events) < 0 && errno != EAGAIN)
            die("cannot watch %s: %s", directory, strerror(errno));
    }
    close(watcher);
}

/* `options` without the mode of a journal: our image has none, and ext4 refuses the word then. Kata's shims
   say data=ordered for every image. */
static const char *without_journal(const char *options)
{
    static char kept[256];
    char words[sizeof kept];

    snprintf(words, sizeof words, "%s", options);
    for (char *word = strtok(words, ","); word != NULL; word = strtok(NULL, ",")) {
        if (strncmp(word, "data=", 5) == 0)
            continue;
        if (kept[0] != '\0')
            strcat(kept, ",");
        strcat(kept, word);
    }
    return kept;
}

static void mount_root(void)
{
    const char *device = argument("root", "");
    const char *type = argument("rootfstype", "ext4");
    const char *options = without_journal(argument("rootflags", ""));
    unsigned long flags = argument("rw", NULL) != NULL ? 0 : MS_RDONLY;

    if (strncmp(device, "/dev/", 5) != 0)
        die("the kernel command line has root=%s; it must be a path below /dev", device);
    wait_for_device(device);
    mkdir(ROOT, 0755);
    if (mount(device, ROOT, type, flags, options) != 0)
        die("cannot mount %s as %s: %s", device, type, strerror(errno));
}

/* ---- what a container guest expects to find ------------------------------------------------- */

static void enable_cgroup_controllers(void)
{
    char names[512], enable[1024] = "";
    int fd = open(ROOT "/sys/fs/cgroup/cgroup.controllers", O_RDONLY | O_CLOEXEC);
    ssize_t length = fd < 0 ? -1 : read(fd, names, sizeof names - 1);

    if (fd >= 0)
        close(fd);
    if (length <= 0) {
        say("cannot read the cgroup controllers: %s", strerror(errno));
        return;
    }
    names[length] = '\0';
    for (char *name = strtok(names, " \n"); name != NULL; name = strtok(NULL, " \n")) {
        if (strlen(enable) + strlen(name) + 3 < sizeof enable)
            strcat(strcat(enable, enable[0] ? " +" : "+"), name);
    }
    fd = open(ROOT "/sys/fs/cgroup/cgroup.subtree_control", O_WRONLY | O_CLOEXEC);
    if (fd < 0 || write(fd, enable, strlen(enable)) < 0)
        say("cannot enable the cgroup controllers %s: %s", enable, strerror(errno));
    if (fd >= 0)
        close(fd);
}

static void furnish_root(void)
{
    static const char *const moved[] = {"/dev", "/proc", "/sys"};
    char target[64];

    for (size_t i = 0; i < sizeof moved / sizeof *moved; i++) {
        snprintf(target, sizeof target, ROOT "%s", moved[i]);
        if (mount(moved[i], target, NULL, MS_MOVE, NULL) != 0)
            die("cannot move %s to the root image: %s", moved[i], strerror(errno));
    }
    mkdir(ROOT "/dev/pts", 0755);
    mkdir(ROOT "/dev/shm", 01777);
    mkdir(ROOT "/dev/mqueue", 01777);
    mount_at("devpts", ROOT "/dev/pts", MS_NOSUID | MS_NOEXEC, "mode=0620,gid=5,ptmxmode=0666");
    mount_at("tmpfs", ROOT "/dev/shm", MS_NOSUID | MS_NODEV, "mode=1777");
    mount_at("mqueue", ROOT "/dev/mqueue", MS_NOSUID | MS_NODEV | MS_NOEXEC, "");
    mount_at("tmpfs", ROOT "/run", MS_NOSUID | MS_NODEV, "mode=0755");
    mount_at("tmpfs", ROOT "/tmp", MS_NOSUID | MS_NODEV, "mode=1777");
    mount_at("cgroup2", ROOT "/sys/fs/cgroup", MS_NOSUID | MS_NODEV | MS_NOEXEC, "");
    enable_cgroup_controllers();
    if (symlink("/proc/self/fd", ROOT "/dev/fd") != 0 || symlink("fd/0", ROOT "/dev/stdin") != 0
        || symlink("fd/1", ROOT "/dev/stdout") != 0 || symlink("fd/2", ROOT "/dev/stderr") != 0)
        say("cannot link the standard streams into /dev: %s", strerror(errno));
}

/* The kernel gives lo its addresses when it comes up. */
static void bring_up_loopback(void)
{
    struct ifreq request = {.ifr_name = "lo", .ifr_flags = IFF_UP | IFF_RUNNING};
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);

    if (fd < 0 || ioctl(fd, SIOCSIFFLAGS, &request) != 0)
        say("cannot bring up lo: %s", strerror(errno));
    if (fd >= 0)
        close(fd);
}

/* ---- what a distribution's init and its container engine set ---------------------------------- */

/* The kernel's own are a fraction of a small machine's memory: 4096 files and 800 processes. What limits a
 * container is its cgroup and what its spec says; containerd's unit has the same. Core files only for who
 * asks: they would land in the container's own directory. */
static void set_limits(void)
{
    static const struct {
        int what;
        struct rlimit limit;
    } limits[] = {
        {RLIMIT_NOFILE, {1048576, 1048576}},
        {RLIMIT_NPROC, {RLIM_INFINITY, RLIM_INFINITY}},
        {RLIMIT_SIGPENDING, {65536, 65536}},
        {RLIMIT_CORE, {0, RLIM_INFINITY}},
    };

    for (size_t i = 0; i < sizeof limits / sizeof *limits; i++)
        if (setrlimit(limits[i].what, &limits[i].limit) != 0)
            say("cannot set the resource limit %d: %s", limits[i].what, strerror(errno));
}

/* As systemd and Debian's sysctl.d have them; max_map_count as in Debian 13, for databases that want it.
 * What the kernel takes from its memory follows that later (agent/memory_limits.py). */
static void set_kernel_settings(void)
{
    static const char *const settings[][2] = {
        {"fs/file-max", "9223372036854775807"}, {"fs/nr_open", "1073741816"},
        {"fs/inotify/max_user_instances", "8192"},
        {"fs/protected_fifos", "1"}, {"fs/protected_hardlinks", "1"}, {"fs/protected_regular", "2"},
        {"fs/protected_symlinks", "1"}, {"kernel/pid_max", "4194304"}, {"net/unix/max_dgram_qlen", "512"},
        {"vm/max_map_count", "1048576"},
    };
    char path[128];

    for (size_t i = 0; i < sizeof settings / sizeof *settings; i++) {
        snprintf(path, sizeof path, ROOT "/proc/sys/%s", settings[i][0]);
        int fd = open(path, O_WRONLY | O_CLOEXEC);
        if (fd < 0 || write(fd, settings[i][1], strlen(settings[i][1])) < 0)
            say("cannot set %s: %s", settings[i][0], strerror(errno));
        if (fd >= 0)
            close(fd);
    }
}

static void switch_root(void)
{
    if (chdir(ROOT) != 0 || mount(".", "/", NULL, MS_MOVE, NULL) != 0 || chroot(".") != 0 || chdir("/") != 0)
        die("cannot make the root image the root: %s", strerror(errno));
}

/* A child of PID 1, reaped by it like any orphan. SCHED_IDLE: only time that nobody else wants. */
static void load_late_modules(void)
{
    struct sched_param parameters = {0};
    pid_t child = fork();

    if (child < 0)
        say("cannot fork: %s", strerror(errno));
    if (child != 0)
        return;
    sched_setscheduler(0, SCHED_IDLE, &parameters);
    load_modules(LATE_MODULES);
    _exit(0);
}

int main(void)
{
    static char *const environment[] = {
        "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "LANG=C.UTF-8",
        "TERM=linux", NULL,
    };

    mount_at("devtmpfs", "/dev", MS_NOSUID, "mode=0755");
    mount_at("proc", "/proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, "");
    mount_at("sysfs", "/sys", MS_NOSUID | MS_NODEV | MS_NOEXEC, "");
    read_command_line();
    load_modules(EARLY_MODULES);
    mount_root();
    furnish_root();
    bring_up_loopback();
    set_limits();
    set_kernel_settings();
    switch_root();
    load_late_modules();

    const char *init = argument("init", "/sbin/init");
    char *const arguments[] = {(char *)init, NULL};
    execve(init, arguments, environment);
    die("cannot execute %s: %s", init, strerror(errno));
}
