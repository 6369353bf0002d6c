/* Split virtqueues from the device's side, with a state memfd that survives the process. */
#ifndef CELLVISOR_RING_H
#define CELLVISOR_RING_H
#include "memory.h"
#endif
