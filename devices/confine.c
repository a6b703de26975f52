/* Between fork and exec of a child: takes away what the child shall not have, then becomes it.
 *
 * What: `kata-confine REPORT STEP... -- PROGRAM NAME ARGUMENT...` does the steps in the order in which they
 * stand there, each a word and a fixed number of arguments (the table below), then executes the program under
 * that name. REPORT is the descriptor of a pipe, which closes with the exec. What comes out of it: "+" when all
 * steps are done; "ERRNO STEP FIRST-ARGUMENT" for the one that failed, after which nothing is executed (that
 * of the exec comes behind the "+"); nothing if it was killed on the way.
 * Why a program: the daemon has threads, so nothing but an exec is safe after its fork. Why C, and without a C
 * library: it stands in the way of every start; like this it costs 0.05 ms, with the library 0.7.
 * Why it decides nothing: what is taken away, and in which order, is said by devices/confine.py, as data
 * that can be read and tested.
 * Invariants: the first step that fails is the last; no step is tried that may fail. It allocates nothing
 * and looks at no environment variable.
 * Source: mount_setattr(2), move_mount(2), pivot_root(2), capabilities(7), seccomp(2), prctl(2), setresuid(2).
 */

#include <asm/unistd.h>
#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/mount.h>
#include <linux/poll.h>
#include <linux/prctl.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <stdint.h>

#ifndef __x86_64__
#error "the system calls and the entry below are those of x86_64"
#endif

#define EINVAL 22
#define EPIPE 32
#define AT_FDCWD (-100)
#define AT_EMPTY_PATH 0x1000
#define AT_RECURSIVE 0x8000
#define O_WRONLY 1
#define O_CREAT 0100
#define O_EXCL 0200
#define O_CLOEXEC 02000000
#define F_SETFD 2
#define FD_CLOEXEC 1
#define MNT_DETACH 2
#define LAST_CAPABILITY 63
#define MOST_INSTRUCTIONS 4096 /* the kernel's own limit of a filter */

typedef long word;

static word call(word number, word a, word b, word c, word d, word e)
{
    register word fourth __asm__("r10") = d;
    register word fifth __asm__("r8") = e;
    word result;

    __asm__ volatile("syscall"
                     : "=a"(result)
                     : "a"(number), "D"(a), "S"(b), "d"(c), "r"(fourth), "r"(fifth)
                     : "rcx", "r11", "memory");
    return result;
}

#define CALL5(name, a, b, c, d, e) call(__NR_##name, (word)(a), (word)(b), (word)(c), (word)(d), (word)(e))
#define CALL4(name, a, b, c, d) CALL5(name, a, b, c, d, 0)
#define CALL3(name, a, b, c) CALL4(name, a, b, c, 0)
#define CALL2(name, a, b) CALL3(name, a, b, 0)
#define CALL1(name, a) CALL2(name, a, 0)

static int report = 2;

static size_t length(const char *text)
{
    size_t n = 0;

    while (text[n])
        n++;
    return n;
}

static int same(const char *a, const char *b)
{
    while (*a && *a == *b)
        a++, b++;
    return *a == *b;
}

/* "ERRNO STEP ARGUMENT", and the end. */
static void __attribute__((noreturn)) fail(word error, const char *step, const char *argument)
{
    char line[600];
    const char *words[] = {step, " ", argument};
    size_t used = 0, number = (size_t)(error < 0 ? -error : error);

    for (size_t digit = 1000; digit; digit /= 10)
        line[used++] = (char)('0' + number / digit % 10);
    line[used++] = ' ';
    for (size_t i = 0; i < sizeof words / sizeof *words; i++)
        for (size_t at = 0; words[i][at] && used < sizeof line; at++)
            line[used++] = words[i][at];
    CALL3(write, report, line, used);
    CALL1(exit_group, 127);
    __builtin_unreachable();
}

/* Of a step that is being done: what `number` says when an argument is none. */
static const char *doing = "";

/* A number in C's notation: 0x for 16, 0 for 8. "-1" is all ones: no limit. */
static uint64_t number(const char *text)
{
    uint64_t value = 0, base = 10;
    const char *at = text;

    if (same(text, "-1"))
        return ~(uint64_t)0;
    if (at[0] == '0' && at[1] == 'x')
        base = 16, at += 2;
    else if (at[0] == '0' && at[1])
        base = 8, at++;
    do {
        uint64_t digit = *at >= 'a' ? (uint64_t)(*at - 'a' + 10) : (uint64_t)(*at - '0');

        if (digit >= base || *at < '0' || (*at > '9' && *at < 'a'))
            fail(EINVAL, doing, text);
        value = value * base + digit;
    } while (*++at);
    return value;
}

/* --- the steps: each gets its arguments, and returns what the system call did ------------------------ */

static word do_limit(char **v) /* RESOURCE SOFT HARD */
{
    struct { uint64_t soft, hard; } limits = {number(v[1]), number(v[2])};

    return CALL4(prlimit64, 0, number(v[0]), &limits, 0);
}

static word do_tell(char **v) /* FD TEXT: write it, such as "0" into cgroup.procs */
{
    word written = CALL3(write, number(v[0]), v[1], length(v[1]));

    if (written < 0)
        return written;
    return CALL1(close, number(v[0]));
}

static word do_enter(char **v) /* FD KIND: of a namespace */
{
    word result = CALL2(setns, number(v[0]), number(v[1]));

    return result < 0 ? result : CALL1(close, number(v[0]));
}

static word do_unshare(char **v) /* FLAGS */
{
    return CALL1(unshare, number(v[0]));
}

static word do_mount(char **v) /* TYPE TARGET FLAGS DATA */
{
    return CALL5(mount, v[0], v[1], v[0], number(v[2]), v[3]);
}

static word do_bind(char **v) /* SOURCE TARGET ATTRIBUTES PROPAGATION: with what is mounted below, both for all */
{
    struct mount_attr attributes = {.attr_set = number(v[2]), .propagation = number(v[3])};
    word tree = CALL3(open_tree, AT_FDCWD, v[0], OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | AT_RECURSIVE), result;

    if (tree < 0)
        return tree;
    result = CALL5(mount_setattr, tree, "", AT_EMPTY_PATH | AT_RECURSIVE, &attributes, sizeof attributes);
    if (result < 0)
        return result;
    result = CALL5(move_mount, tree, "", AT_FDCWD, v[1], MOVE_MOUNT_F_EMPTY_PATH);
    return result < 0 ? result : CALL1(close, tree);
}

static word do_dir(char **v) /* PATH MODE */
{
    return CALL2(mkdir, v[0], number(v[1]));
}

static word do_file(char **v) /* PATH: an empty one, to bind over */
{
    word file = CALL3(open, v[0], O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0444);

    return file < 0 ? file : CALL1(close, file);
}

static word do_link(char **v) /* PATH TEXT */
{
    return CALL2(symlink, v[1], v[0]);
}

static word do_node(char **v) /* PATH TYPE-AND-MODE DEVICE UID */
{
    word result = CALL3(mknod, v[0], number(v[1]), number(v[2]));

    return result < 0 ? result : CALL3(chown, v[0], number(v[3]), number(v[3]));
}

static word do_root(char **v) /* PATH, a mount: becomes "/", and nothing of the old one is left */
{
    word result = CALL1(chdir, v[0]);

    if (result < 0)
        return result;
    result = CALL2(pivot_root, ".", ".");
    if (result < 0)
        return result;
    result = CALL2(umount2, ".", MNT_DETACH);
    return result < 0 ? result : CALL1(chdir, "/");
}

static word do_readonly(char **v) /* PATH, a mount, but not what is mounted below */
{
    struct mount_attr attributes = {.attr_set = MOUNT_ATTR_RDONLY};

    return CALL5(mount_setattr, AT_FDCWD, v[0], 0, &attributes, sizeof attributes);
}

static word do_umask(char **v) /* MASK */
{
    CALL1(umask, number(v[0]));
    return 0;
}

static word do_bounding(char **v) /* CAPABILITIES: the set of those that can ever be had again */
{
    uint64_t kept = number(v[0]);

    for (word capability = 0; capability <= LAST_CAPABILITY; capability++) {
        word result = CALL5(prctl, PR_CAPBSET_READ, capability, 0, 0, 0);

        if (result == -EINVAL)
            return 0; /* more than this kernel knows */
        if (result < 0)
            return result;
        if (result == 1 && !(kept >> capability & 1)) {
            result = CALL5(prctl, PR_CAPBSET_DROP, capability, 0, 0, 0);
            if (result < 0)
                return result;
        }
    }
    return 0;
}

static word do_user(char **v) /* ID: the user, the group, and no other group */
{
    word id = (word)number(v[0]), result = CALL2(setgroups, 0, 0);

    if (result < 0)
        return result;
    result = CALL3(setresgid, id, id, id);
    return result < 0 ? result : CALL3(setresuid, id, id, id);
}

static word do_capabilities(char **v) /* CAPABILITIES: permitted and effective; none inheritable or ambient */
{
    uint64_t kept = number(v[0]);
    struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct data[2] = {
        {.effective = (uint32_t)kept, .permitted = (uint32_t)kept},
        {.effective = (uint32_t)(kept >> 32), .permitted = (uint32_t)(kept >> 32)},
    };
    word result = CALL5(prctl, PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0);

    return result < 0 ? result : CALL2(capset, &header, data);
}

static word do_die_with_parent(char **v) /* SIGNAL; after the change of user, which forgets it */
{
    struct pollfd parent = {.fd = report, .events = 0};
    word result = CALL5(prctl, PR_SET_PDEATHSIG, number(v[0]), 0, 0, 0);

    if (result < 0)
        return result;
    result = CALL3(poll, &parent, 1, 0); /* did it die before that? Then nobody reads the report. */
    if (result < 0)
        return result;
    return parent.revents & POLLERR ? -EPIPE : 0;
}

static word do_no_new_privileges(char **v)
{
    (void)v;
    return CALL5(prctl, PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
}

static word do_filter(char **v) /* FD: a seccomp program, the instructions as the kernel has them */
{
    static struct sock_filter instructions[MOST_INSTRUCTIONS];
    word size = CALL4(pread64, number(v[0]), instructions, sizeof instructions, 0);
    struct sock_fprog program = {.len = (unsigned short)((size_t)size / sizeof *instructions), .filter = instructions};

    if (size < 0)
        return size;
    if (size == 0 || (size_t)size % sizeof *instructions)
        return -EINVAL;
    size = CALL1(close, number(v[0]));
    return size < 0 ? size : CALL3(seccomp, SECCOMP_SET_MODE_FILTER, 0, &program);
}

static const struct {
    const char *name;
    int arguments;
    word (*run)(char **v);
} steps[] = {
    {"limit", 3, do_limit},
    {"tell", 2, do_tell},
    {"enter", 2, do_enter},
    {"unshare", 1, do_unshare},
    {"mount", 4, do_mount},
    {"bind", 4, do_bind},
    {"dir", 2, do_dir},
    {"file", 1, do_file},
    {"link", 2, do_link},
    {"node", 4, do_node},
    {"root", 1, do_root},
    {"readonly", 1, do_readonly},
    {"umask", 1, do_umask},
    {"bounding", 1, do_bounding},
    {"user", 1, do_user},
    {"capabilities", 1, do_capabilities},
    {"die-with-parent", 1, do_die_with_parent},
    {"no-new-privileges", 0, do_no_new_privileges},
    {"filter", 1, do_filter},
};

/* Do the step at `v`; the place of the next one. */
static char **step(char **v)
{
    for (size_t i = 0; i < sizeof steps / sizeof *steps; i++) {
        int given = 0;
        word result;

        if (!same(v[0], steps[i].name))
            continue;
        while (given < steps[i].arguments && v[1 + given])
            given++;
        if (given < steps[i].arguments)
            fail(EINVAL, v[0], "");
        doing = v[0];
        result = steps[i].run(v + 1);
        if (result < 0)
            fail(result, v[0], given ? v[1] : "");
        return v + 1 + given;
    }
    fail(EINVAL, "no step", v[0]);
}

void __attribute__((noreturn)) begin(word *stack)
{
    word count = stack[0], result;
    char **v = (char **)(stack + 1), **environment = v + count + 1;

    if (count < 2)
        fail(EINVAL, "no report", "");
    doing = "report";
    report = (int)number(v[1]);
    result = CALL3(fcntl, report, F_SETFD, FD_CLOEXEC);
    if (result < 0)
        fail(result, "report", v[1]);
    for (v += 2; *v && !same(*v, "--");)
        v = step(v);
    if (!*v || !v[1] || !v[2])
        fail(EINVAL, "no program", "");
    result = CALL3(write, report, "+", 1);
    if (result < 0)
        fail(result, "report", "");
    result = CALL3(execve, v[1], v + 2, environment);
    fail(result, "exec", v[1]);
}

__asm__(".globl _start\n"
        "_start:\n"
        "    xor %ebp, %ebp\n"
        "    mov %rsp, %rdi\n"
        "    and $-16, %rsp\n"
        "    call begin\n");
