/*
 * One more process in a running container, for the agent (agent/enter.py): what `crun exec` would make, without
 * the time to load crun and to read the container's configuration once more.
 *
 * What: three steps, a process each. The first joins nothing: it only makes the second one in the container's
 * cgroup. That one enters the namespaces, finds directory and program there, and gives up every right that the
 * order does not name. The third is born with the container's rights, in its pid namespace, and does nothing but
 * become the program. The second and third are the agent's own children (CLONE_PARENT).
 * Why the rights go before the third is born: it is the first one that the container can see; a container that
 * may trace what it sees finds nothing there that it does not have itself.
 * Invariants:
 * - It does all of an order or nothing: a step that fails is told, and the agent has crun do it instead. So there
 *   is no error message here, and nothing is left out in silence.
 * - Whatever the container can change (its directories, /etc/passwd, the program) is looked at from within the
 *   container's namespaces only, with no descriptor open but the three streams and the pipe to the agent.
 * - It is run from a sealed copy in memory (agent/enter.py) and cannot be traced or read by others before the
 *   exec: what the container reaches by /proc/PID/exe can be written by nobody.
 * - A seccomp filter is the container's, as crun has compiled it. It is set where crun sets it: with no new
 *   privileges as the last of all, else before the rights go, as the kernel asks for one of them then.
 * - No C library: little to load and to copy at each fork, and no state that a fork could break.
 *
 * Descriptors: 0 to 2 the streams, 3 the order, 4 a pidfd of the container's init, 5 the directory of its cgroup,
 * 6 the pipe. On the pipe go records of two numbers: PID and the process, or FAILED and 1000 * line + errno.
 * Source: clone(2), setns(2), capabilities(7), credentials(7), the OCI runtime specification's process.
 */
#include <asm/unistd.h>
#include <linux/close_range.h>
#include <linux/fcntl.h>
#include <linux/prctl.h>
#include <linux/sched.h>
#include <linux/seccomp.h>
#include <linux/stat.h>

typedef unsigned int u32;
typedef unsigned long u64;

enum { ORDER = 3, INIT, CGROUP, REPORT };
enum { PID = 1, FAILED };

#define PROT_READ 1
#define PROT_WRITE 2
#define MAP_PRIVATE 2
#define MAP_ANONYMOUS 32
#define POLLERR 8
#define EPERM 1
#define ENOENT 2
#define EINVAL 22
#define X_OK 1
#define PATH_MOST 4096
#define PASSWD_MOST (1 << 20)
#define NO_OOM 0x7fffffff
#define SPACES (CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS | CLONE_NEWCGROUP)

/* As agent/enter.py packs it: this, then groups, limits, the filter, and texts that end with a zero each: the
 * directory, the arguments, the environment. */
struct order {
    u64 bounding, effective, inheritable, permitted, ambient;
    u32 uid, gid, mask, no_new_privileges;
    int oom;
    u32 groups, limits, arguments, variables, filter, filter_flags, size;
};

struct limit {
    u64 kind, soft, hard;
};

struct record {
    u32 what, value;
};

static char path[PATH_MOST];

static long call(long number, long a, long b, long c, long d, long e)
{
    register long fourth __asm__("r10") = d;
    register long fifth __asm__("r8") = e;
    register long sixth __asm__("r9") = 0; /* mmap's offset; no other has one */
    long result;

    __asm__ volatile("syscall"
                     : "=a"(result)
                     : "a"(number), "D"(a), "S"(b), "d"(c), "r"(fourth), "r"(fifth), "r"(sixth)
                     : "rcx", "r11", "memory");
    return result;
}

static void __attribute__((noreturn)) leave(int code)
{
    for (;;)
        call(__NR_exit_group, code, 0, 0, 0, 0);
}

static void tell(u32 what, u32 value)
{
    struct record record = {what, value};

    call(__NR_write, REPORT, (long)&record, sizeof record, 0, 0);
}

static void __attribute__((noreturn)) give_up(u32 line, long error)
{
    tell(FAILED, line * 1000 + (u32)-error);
    leave(1);
}

/* The value of a system call that must not fail. */
#define MUST(work)                       \
    __extension__({                      \
        long value_ = (work);            \
        if (value_ < 0)                  \
            give_up(__LINE__, value_);   \
        value_;                          \
    })

static u64 length(const char *text)
{
    u64 count = 0;

    while (text[count])
        count++;
    return count;
}

/* What follows `start` in `text`, or nothing. */
static const char *after(const char *text, const char *start)
{
    while (*start)
        if (*text++ != *start++)
            return 0;
    return text;
}

static void *room(u64 size)
{
    return (void *)MUST(call(__NR_mmap, 0, (long)size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1));
}

static char *decimal(char *end, u32 value)
{
    *--end = 0;
    do
        *--end = (char)('0' + value % 10);
    while (value /= 10);
    return end;
}

/* --- step one --------------------------------------------------------------------------------- */

static struct order *read_order(void)
{
    struct order head, *order;
    u64 got = 0;

    if (MUST(call(__NR_pread64, ORDER, (long)&head, sizeof head, 0, 0)) != sizeof head)
        give_up(__LINE__, -EINVAL);
    order = room(head.size);
    while (got < head.size) {
        long count = MUST(call(__NR_pread64, ORDER, (long)order + (long)got, (long)(head.size - got), (long)got, 0));

        if (!count)
            give_up(__LINE__, -EINVAL);
        got += (u64)count;
    }
    return order;
}

static void set_oom(int score)
{
    char text[12], *start = decimal(text + sizeof text, (u32)(score < 0 ? -score : score));
    long file;

    if (score == NO_OOM)
        return;
    if (score < 0)
        *--start = '-';
    file = MUST(call(__NR_openat, AT_FDCWD, (long)"/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC, 0, 0));
    MUST(call(__NR_write, file, (long)start, (long)length(start), 0, 0));
    call(__NR_close, file, 0, 0, 0, 0);
}

/* --- step two --------------------------------------------------------------------------------- */

/* The home of a user in the container's /etc/passwd as "HOME=..."; "/" without such a file or user, as with runc
 * and later versions of crun. */
static char *home(u32 uid)
{
    static char wanted[12], nowhere[] = "HOME=/";
    struct statx info;
    u64 size = 0, at = 0;
    char *text, *user = decimal(wanted + sizeof wanted, uid);
    long file = call(__NR_openat, AT_FDCWD, (long)"/etc/passwd", O_RDONLY | O_CLOEXEC | O_NOCTTY | O_NONBLOCK, 0, 0);

    if (file == -ENOENT)
        return nowhere;
    MUST(file);
    MUST(call(__NR_statx, file, (long)"", AT_EMPTY_PATH, STATX_TYPE | STATX_SIZE, (long)&info));
    if ((info.stx_mode & S_IFMT) != S_IFREG || info.stx_size >= PASSWD_MOST)
        give_up(__LINE__, -EINVAL);
    text = room(info.stx_size + 8);
    text += 5; /* for "HOME=" before the first field */
    while (size < info.stx_size) {
        long count = MUST(call(__NR_read, file, (long)text + (long)size, (long)(info.stx_size - size), 0, 0));

        if (!count)
            break;
        size += (u64)count;
    }
    call(__NR_close, file, 0, 0, 0, 0);
    while (at < size) { /* name:password:uid:gid:comment:home:shell */
        u64 fields[7], count = 0, end = at;
        const char *rest;

        fields[count++] = at;
        for (; end < size && text[end] != '\n'; end++) {
            if (!text[end])
                give_up(__LINE__, -EINVAL);
            if (text[end] == ':' && count < 7)
                fields[count++] = end + 1;
        }
        if (count == 7 && text[at] != '+' && text[at] != '-' && text[at] != '#' && text[at] != ' ') {
            rest = after(text + fields[2], user);
            if (rest && *rest == ':') {
                char *found = text + fields[5] - 5; /* what is before it is not needed any more */
                const char *name = "HOME=";
                u64 i;

                text[fields[6] - 1] = 0;
                for (i = 0; i < 5; i++)
                    found[i] = name[i];
                return found;
            }
        }
        at = end + 1;
    }
    return nowhere;
}

/* 0 if it is a file that may be executed. */
static long runnable(const char *name)
{
    struct statx info;
    long error = call(__NR_faccessat2, AT_FDCWD, (long)name, X_OK, AT_EACCESS, 0);

    if (!error)
        error = call(__NR_statx, AT_FDCWD, (long)name, 0, STATX_TYPE, (long)&info);
    if (!error && (info.stx_mode & S_IFMT) != S_IFREG)
        error = -EPERM;
    return error;
}

/* Where the program is: its own path, or the first of PATH that has it. Relative ones are crun's. */
static const char *find(const char *program, char **environment)
{
    const char *folder = 0;
    u64 size = length(program) + 1;

    if (*program == '/') {
        MUST(runnable(program));
        return program;
    }
    for (; *environment && !folder; environment++)
        folder = after(*environment, "PATH=");
    if (!folder || !*program)
        give_up(__LINE__, -EINVAL);
    for (u64 i = 0; program[i]; i++)
        if (program[i] == '/')
            give_up(__LINE__, -EINVAL);
    while (*folder) {
        u64 count = 0, i;

        if (*folder != '/')
            give_up(__LINE__, -EINVAL);
        for (; *folder && *folder != ':'; folder++)
            if (count + 1 + size < PATH_MOST)
                path[count++] = *folder;
            else
                give_up(__LINE__, -EINVAL);
        path[count++] = '/';
        for (i = 0; i < size; i++)
            path[count + i] = program[i];
        if (!runnable(path))
            return path;
        if (*folder == ':' && !*++folder)
            give_up(__LINE__, -EINVAL); /* an empty last one is the directory */
    }
    give_up(__LINE__, -EINVAL);
}

static void own_streams(u32 uid, u32 gid)
{
    for (long stream = 0; stream < 3; stream++) {
        struct statx info;

        MUST(call(__NR_statx, stream, (long)"", AT_EMPTY_PATH, STATX_TYPE, (long)&info));
        if ((info.stx_mode & S_IFMT) == S_IFIFO) /* not the guest's own /dev/null */
            MUST(call(__NR_fchown, stream, uid, gid, 0, 0));
    }
}

static void give_up_rights(const struct order *order, const u32 *groups)
{
    struct {
        u32 version;
        int pid;
    } header = {0x20080522, 0};
    struct {
        u32 effective, permitted, inheritable;
    } sets[2];
    long number;

    for (number = 0; number < 64; number++) {
        if (call(__NR_prctl, PR_CAPBSET_READ, number, 0, 0, 0) < 0)
            break; /* the kernel has no more */
        if (!(order->bounding >> number & 1))
            MUST(call(__NR_prctl, PR_CAPBSET_DROP, number, 0, 0, 0));
    }
    MUST(call(__NR_setgroups, order->groups, (long)groups, 0, 0, 0));
    MUST(call(__NR_prctl, PR_SET_KEEPCAPS, 1, 0, 0, 0));
    MUST(call(__NR_setresgid, order->gid, order->gid, order->gid, 0, 0));
    MUST(call(__NR_setresuid, order->uid, order->uid, order->uid, 0, 0));
    for (number = 0; number < 2; number++) {
        sets[number].effective = (u32)(order->effective >> 32 * number);
        sets[number].permitted = (u32)(order->permitted >> 32 * number);
        sets[number].inheritable = (u32)(order->inheritable >> 32 * number);
    }
    MUST(call(__NR_capset, (long)&header, (long)sets, 0, 0, 0));
    MUST(call(__NR_prctl, PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0));
    for (number = 0; number < 64; number++)
        if (order->ambient >> number & 1) {
            long error = call(__NR_prctl, PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, number, 0, 0);

            if (error != -EPERM) /* it is not in the other sets: a right less, as with crun */
                MUST(error);
        }
    if (order->no_new_privileges)
        MUST(call(__NR_prctl, PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
}

static void set_filter(const struct order *order, const u64 *filter)
{
    struct {
        unsigned short length;
        const u64 *filter;
    } program = {(unsigned short)order->filter, filter};
    long error;

    if (!order->filter)
        return;
    error = call(__NR_seccomp, SECCOMP_SET_MODE_FILTER, order->filter_flags, (long)&program, 0, 0);
    if (error == -EINVAL) /* the kernel does not know a flag: as crun, without any */
        error = call(__NR_seccomp, SECCOMP_SET_MODE_FILTER, 0, (long)&program, 0, 0);
    MUST(error);
}

static char **list(char **texts, u64 count, u64 more)
{
    char **made = room((count + more + 1) * sizeof *made), *text = *texts;

    for (u64 i = 0; i < count; i++) {
        made[i] = text;
        text += length(text) + 1;
    }
    *texts = text;
    return made;
}

static void __attribute__((noreturn)) enter(const struct order *order)
{
    const u32 *groups = (const u32 *)(order + 1);
    const struct limit *limits = (const struct limit *)(groups + (order->groups + 1) / 2 * 2);
    const u64 *filter = (const u64 *)(limits + order->limits);
    char *texts = (char *)(filter + order->filter), *folder = texts, **arguments, **environment;
    struct {
        int file;
        short events, found;
    } pipe = {REPORT, 0, 0};
    const char *program;
    long pid, has_home = 0;
    u32 i;

    texts += length(texts) + 1;
    arguments = list(&texts, order->arguments, 0);
    environment = list(&texts, order->variables, 1);
    for (i = 0; i < order->variables; i++)
        has_home |= after(environment[i], "HOME=") != 0;

    MUST(call(__NR_setns, INIT, SPACES, 0, 0, 0));
    MUST(call(__NR_close_range, ORDER, CGROUP, 0, 0, 0));
    MUST(call(__NR_fcntl, REPORT, F_SETFD, FD_CLOEXEC, 0, 0));
    MUST(call(__NR_setsid, 0, 0, 0, 0, 0));
    MUST(call(__NR_chdir, (long)folder, 0, 0, 0, 0));
    if (!has_home)
        environment[order->variables] = home(order->uid);
    program = find(arguments[0], environment);
    own_streams(order->uid, order->gid);
    call(__NR_umask, order->mask, 0, 0, 0, 0);
    for (i = 0; i < order->limits; i++)
        MUST(call(__NR_prlimit64, 0, (long)limits[i].kind, (long)&limits[i].soft, 0, 0));
    if (!order->no_new_privileges)
        set_filter(order, filter);
    give_up_rights(order, groups);
    /* The rights are gone, and with them the kernel has made it readable again, or not: once more. */
    MUST(call(__NR_prctl, PR_SET_DUMPABLE, 0, 0, 0, 0));
    if (MUST(call(__NR_poll, (long)&pipe, 1, 0, 0, 0)))
        leave(1); /* nobody waits for it any more */

    pid = MUST(call(__NR_clone, CLONE_PARENT, 0, 0, 0, 0));
    if (!pid) {
        /* --- step three */
        if (order->no_new_privileges)
            set_filter(order, filter);
        MUST(call(__NR_execve, (long)program, (long)arguments, (long)environment, 0, 0));
    }
    tell(PID, (u32)pid);
    leave(0);
}

static void __attribute__((noreturn, used)) begin(void)
{
    struct clone_args how;
    struct order *order;
    char *byte = (char *)&how;
    u64 i;

    for (i = 0; i < sizeof how; i++)
        byte[i] = 0;
    MUST(call(__NR_prctl, PR_SET_DUMPABLE, 0, 0, 0, 0));
    MUST(call(__NR_close_range, REPORT + 1, ~0U, 0, 0, 0));
    order = read_order();
    set_oom(order->oom);
    how.flags = CLONE_PARENT | CLONE_INTO_CGROUP;
    how.cgroup = CGROUP;
    if (!MUST(call(__NR_clone3, (long)&how, sizeof how, 0, 0, 0)))
        enter(order);
    leave(0);
}

/* The kernel leaves the stack at a multiple of 16, as a call would not. */
void __attribute__((noreturn, naked)) _start(void)
{
    __asm__ volatile("call begin");
}
