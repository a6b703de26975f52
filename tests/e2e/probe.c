/*
 * What busybox has no applet for: locks, inotify, threads, huge pages. Run in containers by the tests.
 *
 *   probe flock|fcntl FILE     take the lock without waiting: "granted", or why not
 *   probe flock-wait|fcntl-wait FILE   the same, waiting for it
 *   probe watch DIRECTORY      print the names of what is made, moved in and removed, a line each, for ever
 *   probe threads COUNT        have so many threads at once: how many there were
 *   probe huge MEGABYTES       use so much memory in huge pages: "used", or why not
 */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/inotify.h>
#include <sys/mman.h>
#include <unistd.h>

static int say(int failed, const char *good)
{
    printf("%s\n", failed ? strerror(errno) : good);
    return 0;
}

static int lock(const char *how, const char *path)
{
    struct flock whole = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
    int fd = open(path, O_RDWR), wait = strstr(how, "-wait") != NULL;

    if (fd < 0)
        return say(1, "");
    if (strncmp(how, "flock", 5) == 0)
        return say(flock(fd, wait ? LOCK_EX : LOCK_EX | LOCK_NB), "granted");
    return say(fcntl(fd, wait ? F_SETLKW : F_SETLK, &whole), "granted");
}

static int watch(const char *path)
{
    char buffer[4096] __attribute__((aligned(8)));
    int fd = inotify_init();
    ssize_t length;

    if (inotify_add_watch(fd, path, IN_CREATE | IN_MOVED_TO | IN_DELETE) < 0)
        return say(1, "");
    puts("watching");
    fflush(stdout);
    while ((length = read(fd, buffer, sizeof buffer)) > 0) {
        for (char *at = buffer; at < buffer + length;) {
            struct inotify_event *event = (struct inotify_event *)at;
            printf("%s %s\n", event->mask & IN_CREATE ? "made" : event->mask & IN_DELETE ? "gone" : "moved", event->name);
            at += sizeof *event + event->len;
        }
        fflush(stdout);
    }
    return 0;
}

static void *wait_for_ever(void *unused)
{
    pause();
    return unused;
}

static int threads(int wanted)
{
    pthread_attr_t attributes;
    pthread_t thread;
    int made = 0;

    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, 65536);
    while (made < wanted && pthread_create(&thread, &attributes, wait_for_ever, NULL) == 0)
        made++;
    printf("%d\n", made);
    return 0;
}

static int huge(size_t megabytes)
{
    void *memory = mmap(NULL, megabytes << 20, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB, -1, 0);

    if (memory == MAP_FAILED)
        return say(1, "");
    memset(memory, 1, megabytes << 20);
    return say(0, "used");
}

int main(int count, char **arguments)
{
    if (count != 3)
        return 2;
    if (strcmp(arguments[1], "watch") == 0)
        return watch(arguments[2]);
    if (strcmp(arguments[1], "threads") == 0)
        return threads(atoi(arguments[2]));
    if (strcmp(arguments[1], "huge") == 0)
        return huge((size_t)atoi(arguments[2]));
    return lock(arguments[1], arguments[2]);
}
