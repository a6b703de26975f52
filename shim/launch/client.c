/* containerd-shim-kata-v2, the part that containerd waits for.
 *
 * What: hands a `start` (arguments, environment, working directory, streams) to the zygote and prints its answer.
 * Whatever else it is asked, and wherever there is no zygote or it refuses, it executes the Python launcher, as if
 * it were not there itself.
 * Why in C: an interpreter alone takes longer to start than runc's whole shim.
 * Invariants: never two daemons for one call: the zygote's child does nothing before it has read GO, and whoever
 * falls back after GO has killed that child first, by a pidfd that was opened before GO. Every wait has a limit.
 * Nothing is believed that comes from a socket of another user's.
 *
 * shim.launch.launcher_script writes the places into `config` when it installs this; the protocol is told in
 * shim/launch/zygote.py.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define MAGIC "KZ1\n"
#define MAX_FRAME (1 << 20) /* bytes of arguments and environment: what the zygote takes */
#define MAX_ANSWER 4096
#define READY_LIMIT 1000 /* ms until somebody must have said READY */
#define DONE_LIMIT 10000 /* ms from GO to the answer */
#define END_LIMIT 5000   /* ms for a killed child to be gone */

/* The interpreter, its code and the zygote's socket ("" for none), each ended by a NUL. Replaced whole. */
__attribute__((used)) static volatile char config[8192] = "@KATA-SHIM-CLIENT-CONFIG@";
static const char *python, *code, *place;

static void read_config(void)
{
    const char *at = (const char *)config, *end = at + sizeof config;
    const char **fields[] = {&python, &code, &place};
    for (size_t i = 0; i < 3; i++) {
        const char *stop = memchr(at, 0, (size_t)(end - at));
        if (!stop || (i < 2 && stop == at) || *config != '/') {
            fputs("containerd-shim-kata-v2: not installed by shim.launch.launcher_script\n", stderr);
            exit(1);
        }
        *fields[i] = at;
        at = stop + 1;
    }
}

static const char *program(char **argv)
{
    /* The path that was executed, as the kernel tells it to the interpreter of a script. */
    const char *name = (const char *)getauxval(AT_EXECFN);
    return name && *name ? name : argv[0];
}

static long now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

/* Whether `fd` becomes readable before `until`. */
static int wait_for(int fd, long until)
{
    struct pollfd p = {.fd = fd, .events = POLLIN};
    long left = until - now();
    return left > 0 && poll(&p, 1, (int)left) == 1;
}

static int receive(int fd, void *into, size_t size, long until)
{
    char *at = into;
    while (size) {
        if (!wait_for(fd, until))
            return 0;
        ssize_t got = recv(fd, at, size, MSG_DONTWAIT);
        if (got <= 0)
            return 0;
        at += got;
        size -= (size_t)got;
    }
    return 1;
}

static int dial(void)
{
    struct sockaddr_un name = {.sun_family = AF_UNIX};
    struct timeval limit = {.tv_sec = READY_LIMIT / 1000, .tv_usec = READY_LIMIT % 1000 * 1000};
    struct ucred peer;
    socklen_t size = sizeof peer;
    if (strlen(place) >= sizeof name.sun_path)
        return -1;
    strcpy(name.sun_path, place);
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return -1;
    /* It also limits connect, which waits where the backlog is full. */
    if (setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit) ||
        connect(fd, (struct sockaddr *)&name, sizeof name) ||
        getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &size) || peer.uid != geteuid()) {
        close(fd);
        return -1;
    }
    return fd;
}

static int send_all(int fd, const char *at, size_t size, const int *fds, size_t count)
{
    union {
        struct cmsghdr head;
        char room[CMSG_SPACE(4 * sizeof(int))];
    } control = {0};
    while (size) {
        struct iovec piece = {.iov_base = (void *)at, .iov_len = size};
        struct msghdr message = {.msg_iov = &piece, .msg_iovlen = 1};
        if (count) {
            message.msg_control = &control;
            message.msg_controllen = CMSG_SPACE(count * sizeof(int));
            control.head.cmsg_level = SOL_SOCKET;
            control.head.cmsg_type = SCM_RIGHTS;
            control.head.cmsg_len = CMSG_LEN(count * sizeof(int));
            memcpy(CMSG_DATA(&control.head), fds, count * sizeof *fds);
        }
        ssize_t sent = sendmsg(fd, &message, MSG_NOSIGNAL);
        if (sent <= 0)
            return 0;
        count = 0;
        at += sent;
        size -= (size_t)sent;
    }
    return 1;
}

static size_t add(char *frame, size_t at, const char *word)
{
    size_t size = strlen(word) + 1;
    if (at > MAX_FRAME || size > MAX_FRAME - at)
        return MAX_FRAME + 1;
    memcpy(frame + at, word, size);
    return at + size;
}

static int ask(int fd, char **argv, char **envp)
{
    static char frame[12 + MAX_FRAME];
    uint32_t argc = 1;
    size_t size = add(frame + 12, 0, program(argv));
    for (char **word = argv + 1; *word; word++, argc++)
        size = add(frame + 12, size, *word);
    for (char **word = envp; *word; word++)
        size = add(frame + 12, size, *word);
    if (size > MAX_FRAME)
        return 0;
    uint32_t length = (uint32_t)size;
    memcpy(frame, MAGIC, 4);
    memcpy(frame + 4, &argc, 4);
    memcpy(frame + 8, &length, 4);
    return send_all(fd, frame, 12 + size, NULL, 0);
}

/* GO, with the descriptors. Not before: in the queue of a zygote that stands still they would keep containerd's
 * pipe open, which it reads to its end. */
static int go(int fd)
{
    int here = open(".", O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (here < 0)
        return 0;
    int fds[] = {here, 0, 1, 2};
    int sent = send_all(fd, "G", 1, fds, 4);
    close(here);
    return sent;
}

/* After GO: the child's end, for certain, so that the launcher may start another one. */
static void end(int child)
{
    syscall(SYS_pidfd_send_signal, child, SIGKILL, NULL, 0);
    if (!wait_for(child, now() + END_LIMIT)) {
        fputs("containerd-shim-kata-v2: start: the zygote's child does not end; try: look at its state\n", stderr);
        exit(1);
    }
    close(child);
}

/* Ends the process with the answer's code, or returns. */
static void try_zygote(char **argv, char **envp)
{
    struct __attribute__((packed)) {
        char kind;
        uint32_t pid;
    } ready;
    struct __attribute__((packed)) {
        char kind;
        uint8_t code;
        uint32_t size;
    } done;
    char answer[MAX_ANSWER];
    long until = now() + READY_LIMIT;
    int fd = dial();
    if (fd < 0)
        return;
    if (!ask(fd, argv, envp) || !receive(fd, &ready, sizeof ready, until) || ready.kind != 'R') {
        close(fd);
        return;
    }
    int child = (int)syscall(SYS_pidfd_open, (pid_t)ready.pid, 0);
    if (child < 0 || !go(fd)) {
        close(fd);
        return;
    }
    until = now() + DONE_LIMIT;
    if (receive(fd, &done, sizeof done, until) && done.kind == 'D' && done.size <= MAX_ANSWER &&
        receive(fd, answer, done.size, until)) {
        for (uint32_t at = 0; at < done.size;) {
            ssize_t put = write(1, answer + at, done.size - at);
            if (put <= 0)
                _exit(1);
            at += (uint32_t)put;
        }
        _exit(done.code);
    }
    end(child);
    close(fd);
}

int main(int argc, char **argv, char **envp)
{
    read_config();
    const char *wanted = getenv("KATA_SHIM_ZYGOTE");
    if (argc > 1 && !strcmp(argv[argc - 1], "start") && *place && !(wanted && !strcmp(wanted, "off")))
        try_zygote(argv, envp);
    char **words = calloc((size_t)argc + 4, sizeof *words);
    if (!words)
        return 1;
    words[0] = (char *)python;
    words[1] = (char *)"-ISc";
    words[2] = (char *)code;
    words[3] = (char *)program(argv);
    if (argc > 1)
        memcpy(words + 4, argv + 1, (size_t)(argc - 1) * sizeof *words);
    execve(python, words, envp);
    fprintf(stderr, "containerd-shim-kata-v2: cannot execute %s: %m; try: install kata-shim again\n", python);
    return 1;
}
