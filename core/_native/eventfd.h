/* Add one to an eventfd that somebody else may have made blocking and full. */
#ifndef CELLVISOR_EVENTFD_H
#define CELLVISOR_EVENTFD_H

/* 0 or -errno; never waits. write(2) may: O_NONBLOCK belongs to the open file, which a peer that holds it can change
   at any moment, and pwritev2(2) takes no RWF_NOWAIT there. The completion of an empty read does not wait. */
int cv_eventfd_signal(int fd);

#endif
