/* The container that holds a pod together: it does nothing, and reaps what becomes its child.
 *
 * What: PID 1 of a pod's pid namespace, when that is shared; else a process that keeps the sandbox's
 * own container running until it is told to end. SIGTERM and SIGINT end it with status 0.
 * Why without a C library: it lives as long as the pod, in every pod; like this it is a few kilobytes
 * on disk and three pages of memory. It is the only file of its root file system (guest/contents.py).
 * Invariants: it allocates nothing, opens nothing, and leaves no zombie.
 *
 * All signals are blocked and waited for instead of handled: a blocked signal reaches even the PID 1
 * of a pid namespace, for which the kernel drops those that it has no handler for.
 */

#include <asm/unistd.h>

#define SIGINT 2
#define SIGTERM 15
#define SIGCHLD 17
#define SIG_SETMASK 2
#define WNOHANG 1
#define BIT(number) (1UL << ((number) - 1))

static long call(long number, long a, long b, long c, long d)
{
    register long fourth __asm__("r10") = d;
    long result;

    __asm__ volatile("syscall"
                     : "=a"(result)
                     : "a"(number), "D"(a), "S"(b), "d"(c), "r"(fourth)
                     : "rcx", "r11", "memory");
    return result;
}

void __attribute__((noreturn)) _start(void)
{
    const unsigned long all = ~0UL, awaited = BIT(SIGINT) | BIT(SIGTERM) | BIT(SIGCHLD);

    call(__NR_rt_sigprocmask, SIG_SETMASK, (long)&all, 0, sizeof all);
    for (;;) {
        long signal = call(__NR_rt_sigtimedwait, (long)&awaited, 0, 0, sizeof awaited);

        if (signal == SIGINT || signal == SIGTERM)
            call(__NR_exit_group, 0, 0, 0, 0);
        while (call(__NR_wait4, -1, 0, WNOHANG, 0) > 0)
            ;
    }
}
