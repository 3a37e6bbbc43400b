/* The state of the memory room, as C code sees it: memory/recycling.py changes it.
 *
 * Invariant: `rows` and `addresses` have each made or mapped block that a message may refer to, and no other, so an
 * address that is found there is that of a storage which lives: the block keeps it.
 */

#include "core.h"

#include <string.h>

#define ROWS 32768u

Memory memory;

/* The registered blocks, by the row in their number. */
static Block *rows[ROWS];

bool memory_ready(void)
{
    return torch_ready && memory.lock != NULL && memory.counts != NULL && memory.poller != NULL &&
           memory.addresses != NULL && memory.finalized != NULL;
}

int memory_lock(Py_ssize_t new_tensors)
{
    if (lock_acquire(memory.lock) < 0)
        return -1;
    Py_ssize_t finalized = PyObject_Size(memory.finalized);
    if (finalized > 0) {
        PyObject *result = PyObject_CallFunctionObjArgs(memory.drain, NULL);
        Py_XDECREF(result);
        finalized = result == NULL ? -1 : 0;
    }
    if (finalized < 0 || (new_tensors > 0 && poller_poll(memory.poller, new_tensors) < 0)) {
        memory_unlock();
        return -1;
    }
    return 0;
}

void memory_unlock(void)
{
    lock_release(memory.lock);
}

Block *memory_block(uint64_t number, uint64_t nbytes)
{
    uint64_t row = number & 0xFFFFFFFF;
    Block *block = row < ROWS ? rows[row] : NULL;
    if (block == NULL || block->number != number || block->nbytes != nbytes || block->kind > MAPPED)
        return NULL;
    return block;
}

Block *memory_block_at(uint64_t address)
{
    PyObject *key = PyLong_FromUnsignedLongLong(address);
    if (key == NULL)
        return NULL;
    PyObject *found = PyDict_GetItemWithError(memory.addresses, key);
    Py_DECREF(key);
    return (Block *)found;
}

static void replace(PyObject **place, PyObject *value)
{
    PyObject *old = *place;
    Py_XINCREF(value);
    *place = value;
    Py_XDECREF(old);
}

/* set_memory(lock, poller, finalized, drain, addresses) */
static PyObject *set_memory(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    (void)module;
    if (count != 5 || !PyObject_TypeCheck(args[0], StateLock_Type) || !PyObject_TypeCheck(args[1], UsePoller_Type) ||
        !PyDict_Check(args[4])) {
        PyErr_SetString(PyExc_TypeError, "set_memory() takes a StateLock, a UsePoller, a deque, a function and a dict");
        return NULL;
    }
    replace((PyObject **)&memory.lock, args[0]);
    replace((PyObject **)&memory.poller, args[1]);
    replace(&memory.finalized, args[2]);
    replace(&memory.drain, args[3]);
    replace(&memory.addresses, args[4]);
    Py_RETURN_NONE;
}

/* set_lock(lock): this one from now on, in the child of a fork. The old one stays: a signal handler or a finalizer may have
 * forked in the middle of a call that is about to take it. */
static PyObject *set_lock(PyObject *module, PyObject *lock)
{
    (void)module;
    if (!PyObject_TypeCheck(lock, StateLock_Type)) {
        PyErr_SetString(PyExc_TypeError, "a StateLock was expected");
        return NULL;
    }
    if (memory.lock != NULL) { /* else set_memory() has not been called */
        Py_INCREF(lock);
        memory.lock = (StateLock *)lock;
    }
    Py_RETURN_NONE;
}

/* set_counts(counts): the reference table of this process; None if it has none. */
static PyObject *set_counts(PyObject *module, PyObject *counts)
{
    (void)module;
    if (counts != Py_None && !PyObject_TypeCheck(counts, Counts_Type)) {
        PyErr_SetString(PyExc_TypeError, "Counts or None were expected");
        return NULL;
    }
    replace((PyObject **)&memory.counts, counts == Py_None ? NULL : counts);
    Py_RETURN_NONE;
}

static PyObject *register_block(PyObject *module, PyObject *op)
{
    (void)module;
    if (!is_block(op))
        return NULL;
    Block *block = (Block *)op;
    uint64_t row = block->number & 0xFFFFFFFF;
    if (block->number != UNTRACKED && row < ROWS)
        replace((PyObject **)&rows[row], op);
    Py_RETURN_NONE;
}

static PyObject *unregister_block(PyObject *module, PyObject *op)
{
    (void)module;
    if (!is_block(op))
        return NULL;
    uint64_t row = ((Block *)op)->number & 0xFFFFFFFF;
    if (row < ROWS && rows[row] == (Block *)op)
        replace((PyObject **)&rows[row], NULL);
    Py_RETURN_NONE;
}

static PyObject *unregister_all(PyObject *module, PyObject *unused)
{
    (void)module, (void)unused;
    for (size_t row = 0; row < ROWS; row++)
        if (rows[row] != NULL)
            replace((PyObject **)&rows[row], NULL);
    Py_RETURN_NONE;
}

static PyObject *hits(PyObject *module, PyObject *unused)
{
    (void)module, (void)unused;
    return PyLong_FromUnsignedLongLong(memory.hits);
}

static PyMethodDef functions[] = {
    {"set_memory", (PyCFunction)(void (*)(void))set_memory, METH_FASTCALL, NULL},
    {"set_lock", set_lock, METH_O, NULL},
    {"set_counts", set_counts, METH_O, NULL},
    {"register_block", register_block, METH_O, NULL},
    {"unregister_block", unregister_block, METH_O, NULL},
    {"unregister_all", unregister_all, METH_NOARGS, NULL},
    {"hits", hits, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

int add_memory(PyObject *module)
{
    return add_functions(module, functions);
}
