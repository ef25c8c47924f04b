/* A few threads that share out the items of one piece of work at a time.
 *
 * The calling thread works too and needs nobody: a helper that the system has put aside holds up at most the item it
 * had taken. Helpers look for work without sleeping while a step runs (`threads_wake` .. `threads_rest`) and cost
 * nothing in between.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <unistd.h>
#if defined(__linux__)
#include <linux/futex.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#endif

#include "tailrace.h"

/* Looks for work before a waiting thread offers its processor to others. */
#define SPINS_BEFORE_YIELD 4000

#define PAGE 4096

typedef struct {
    _Atomic(Work) work;
    _Atomic(void *) argument;
    atomic_int items;
} Task;

struct Threads {
    int count;
    pthread_t *handles;
    /* Number of the task in the upper half, next item in the lower: an item can only be taken from the task it is of. */
    _Alignas(64) atomic_uint_fast64_t ticket;
    _Alignas(64) atomic_int done;
    _Alignas(64) atomic_int awake;
    atomic_int stopping;
    /* Task n stands in place n % 2, and is not overwritten while an item of it can still be taken. */
    Task tasks[2];
};

static void pause_briefly(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("yield");
#endif
}

static void wait_while_equal(atomic_int *word, int value) {
#if defined(__linux__)
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, NULL, NULL, 0);
#else
    if (atomic_load(word) == value) usleep(200);
#endif
}

static void wake_all(atomic_int *word) {
#if defined(__linux__)
    syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, 1 << 30, NULL, NULL, 0);
#else
    (void)word;
#endif
}

/* Take one item and do it; return 0 when there is none. */
static int work_once(Threads *threads) {
    uint_fast64_t ticket = atomic_load_explicit(&threads->ticket, memory_order_acquire);
    for (;;) {
        Task *task = &threads->tasks[(ticket >> 32) & 1];
        int item = (int)(uint32_t)ticket;
        if (item >= atomic_load_explicit(&task->items, memory_order_relaxed)) return 0;
        if (atomic_compare_exchange_weak_explicit(&threads->ticket, &ticket, ticket + 1, memory_order_acq_rel,
                                                  memory_order_acquire)) {
            Work work = atomic_load_explicit(&task->work, memory_order_relaxed);
            work(atomic_load_explicit(&task->argument, memory_order_relaxed), item);
            atomic_fetch_add_explicit(&threads->done, 1, memory_order_release);
            return 1;
        }
    }
}

static void *help(void *argument) {
    Threads *threads = argument;
    int idle = 0;
    while (!atomic_load_explicit(&threads->stopping, memory_order_relaxed)) {
        if (work_once(threads)) {
            idle = 0;
        } else if (!atomic_load_explicit(&threads->awake, memory_order_acquire)) {
            wait_while_equal(&threads->awake, 0);
        } else if (++idle > SPINS_BEFORE_YIELD) {
            sched_yield();
        } else {
            pause_briefly();
        }
    }
    return NULL;
}

/* Return `count` threads, the caller's included, or NULL when the system has none left. */
Threads *tr_threads_start(int count) {
    Threads *threads = aligned_alloc(64, (sizeof(Threads) + 63) / 64 * 64);
    if (!threads) return NULL;
    memset(threads, 0, sizeof *threads);
    threads->handles = calloc((size_t)(count > 0 ? count : 1), sizeof(pthread_t));
    threads->count = 1;
    if (!threads->handles) {
        free(threads);
        return NULL;
    }
    for (int i = 1; i < count; i++) {
        if (pthread_create(&threads->handles[i], NULL, help, threads)) {
            tr_threads_stop(threads);
            return NULL;
        }
        threads->count++;
    }
    return threads;
}

void tr_threads_stop(Threads *threads) {
    atomic_store(&threads->stopping, 1);
    atomic_store(&threads->awake, 1);
    wake_all(&threads->awake);
    for (int i = 1; i < threads->count; i++) pthread_join(threads->handles[i], NULL);
    free(threads->handles);
    free(threads);
}

/* Have the system give memory to each page of `bytes` at `start`, whatever they hold and whoever writes to them. */
void tr_touch(char *start, size_t bytes) {
#if defined(__linux__)
    setpriority(PRIO_PROCESS, (id_t)syscall(SYS_gettid), 19);
#endif
    for (size_t at = 0; at < bytes; at += PAGE) __atomic_fetch_or(start + at, 0, __ATOMIC_RELAXED);
}

int threads_count(const Threads *threads) { return threads->count; }

void threads_wake(Threads *threads) {
    if (threads->count == 1) return;
    atomic_store_explicit(&threads->awake, 1, memory_order_release);
    wake_all(&threads->awake);
}

void threads_rest(Threads *threads) { atomic_store_explicit(&threads->awake, 0, memory_order_release); }

/* Call `work(argument, item)` for each item 0 .. items - 1, in any order, on all threads; return when all are done. */
void threads_each(Threads *threads, Work work, void *argument, int items) {
    if (threads->count == 1 || items == 1) {
        for (int item = 0; item < items; item++) work(argument, item);
        return;
    }
    uint_fast64_t number = (atomic_load_explicit(&threads->ticket, memory_order_relaxed) >> 32) + 1;
    Task *task = &threads->tasks[number & 1];
    atomic_store_explicit(&task->work, work, memory_order_relaxed);
    atomic_store_explicit(&task->argument, argument, memory_order_relaxed);
    atomic_store_explicit(&task->items, items, memory_order_relaxed);
    atomic_store_explicit(&threads->done, 0, memory_order_relaxed);
    atomic_store_explicit(&threads->ticket, number << 32, memory_order_release);
    while (work_once(threads)) {
    }
    for (int idle = 0; atomic_load_explicit(&threads->done, memory_order_acquire) < items;) {
        if (++idle > SPINS_BEFORE_YIELD)
            sched_yield();
        else
            pause_briefly();
    }
}
