/*
 * A putenv that takes as long for the ten-thousandth variable as for the first.
 *
 * Why: crun gives a container's environment to libc one by one, and libc looks through all that it has for
 * each: 4,000 variables, which a Kubernetes service of many ports or a CI job has, took 15 s in an emulated
 * guest. The agent preloads this into the runs of crun that are to set many (agent/crun.py).
 * Invariants: for a caller that names no variable twice, which the agent sees to. An environment that somebody
 * else has changed meanwhile (clearenv, setenv) is taken over as it is then. Nothing is ever freed: the process
 * becomes another program.
 * Source: putenv(3), environ(7).
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

extern char **environ;

static char **list;
static size_t used, room;

int putenv(char *entry)
{
    if (list == NULL || environ != list) {
        for (used = 0; environ != NULL && environ[used] != NULL; used++)
            ;
        room = 0;
    }
    if (used + 2 > room) {
        size_t wanted = 2 * used + 1024;
        char **larger = malloc(wanted * sizeof *larger);

        if (larger == NULL) {
            errno = ENOMEM;
            return -1;
        }
        if (used > 0)
            memcpy(larger, environ, used * sizeof *larger);
        list = larger;
        room = wanted;
    }
    list[used++] = entry;
    list[used] = NULL;
    environ = list;
    return 0;
}
