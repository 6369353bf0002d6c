/* Force-included into ring.c by build_faults.py: a call into the ring can be killed before its k-th store. */
#ifndef CELLVISOR_FAULTS_H
#define CELLVISOR_FAULTS_H
#include <setjmp.h>

#define CV_KILLED 30000

extern jmp_buf cv_fault_env;
extern int cv_fault_dead;
extern long cv_fault_left;

/* Die at the point after `points` more, never if negative. Revives what is dead. */
void cv_fault_arm(long points);

/* Pass a point that lies outside the ring code (between payload stores): CV_KILLED if it is deadly. */
int cv_fault_point(void);

/* A dead process does nothing more: every later call returns at once. */
#define CV_ENTER()                                      \
    do {                                                \
        if (cv_fault_dead || setjmp(cv_fault_env))      \
            return -CV_KILLED;                          \
    } while (0)
#define CV_POINT()                                                  \
    do {                                                            \
        if (cv_fault_left >= 0 && cv_fault_left-- == 0) {           \
            cv_fault_dead = 1;                                      \
            longjmp(cv_fault_env, 1);                               \
        }                                                           \
    } while (0)
#endif
