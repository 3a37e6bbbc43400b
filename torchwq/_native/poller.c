/* Polls which blocks that messages have brought are still in use. Its twin, memory/use_poller.py, says why it polls, in
 * which order, and what the levels are.
 */

#include "core.h"

#include <stdlib.h>

#define LEVELS 10

/* Blocks, first in first out. It owns a reference to each. */
typedef struct {
    Block **items;
    size_t first;
    size_t count;
    size_t capacity;
} Ring;

struct UsePoller {
    PyObject_HEAD
    PyObject *on_idle; /* on_idle(block): nothing in this process uses it any more */
    uint64_t messages;
    Ring levels[LEVELS + 1];
};

PyTypeObject *UsePoller_Type;

/* Takes over the reference, also if it fails. */
static int push(Ring *ring, Block *block)
{
    if (ring->count == ring->capacity) {
        size_t capacity = ring->capacity ? 2 * ring->capacity : 16;
        Block **items = malloc(capacity * sizeof *items);
        if (items == NULL) {
            Py_DECREF(block);
            PyErr_NoMemory();
            return -1;
        }
        for (size_t at = 0; at < ring->count; at++)
            items[at] = ring->items[(ring->first + at) % ring->capacity];
        free(ring->items);
        ring->items = items, ring->first = 0, ring->capacity = capacity;
    }
    ring->items[(ring->first + ring->count++) % ring->capacity] = block;
    return 0;
}

static Block *pop(Ring *ring)
{
    if (!ring->count)
        return NULL;
    Block *block = ring->items[ring->first];
    ring->first = (ring->first + 1) % ring->capacity;
    ring->count--;
    return block;
}

int poller_add(UsePoller *self, Block *block)
{
    if (block->is_polled)
        return 0;
    block->is_polled = 1;
    Py_INCREF(block);
    if (push(&self->levels[0], block) < 0) {
        block->is_polled = 0;
        return -1;
    }
    return 0;
}

/* Takes back the IN_USE of a mapped block, if nothing uses it: 1 if it need not be polled, 0, or -1 with an exception. */
static int try_release(UsePoller *self, Block *block)
{
    if (block->kind != MAPPED)
        return 1;
    int used = block_in_use(block);
    if (used)
        return used < 0 ? -1 : 0;
    if (memory.counts != NULL && block->is_listed_idle && !block->is_orphaned) {
        counts_clear_flag(memory.counts, block->number, STATE_IN_USE);
        return 1;
    }
    PyObject *result = PyObject_CallFunctionObjArgs(self->on_idle, (PyObject *)block, NULL);
    if (result == NULL)
        return -1;
    Py_DECREF(result);
    return 1;
}

static int poll_level(UsePoller *self, int level, int next_level, size_t limit)
{
    Ring *blocks = &self->levels[level];
    limit = limit < blocks->count ? limit : blocks->count;
    while (limit--) {
        Block *block = pop(blocks);
        if (block == NULL)
            return 0; /* a finalizer has polled meanwhile */
        block->is_polled = 0;
        int done = try_release(self, block);
        if (done == 1 || block->is_polled) {
            Py_DECREF(block);
        } else {
            PyObject *type, *value, *traceback;
            PyErr_Fetch(&type, &value, &traceback);
            block->is_polled = 1;
            if (push(&self->levels[next_level], block) < 0)
                PyErr_Clear(); /* it counts as in use until the next message brings it */
            PyErr_Restore(type, value, traceback);
        }
        if (done < 0)
            return -1;
    }
    return 0;
}

int poller_poll(UsePoller *self, Py_ssize_t new_tensors)
{
    uint64_t turn = ++self->messages;
    if (self->levels[LEVELS].count && poll_level(self, LEVELS, LEVELS, (size_t)new_tensors + 1) < 0)
        return -1;
    int highest = 2 * (__builtin_ctzll(turn) + 1) - 1;
    if (highest > LEVELS - 1)
        highest = LEVELS - 1;
    for (int level = highest; level >= 0; level--)
        if (self->levels[level].count && poll_level(self, level, level + 1, self->levels[level].count) < 0)
            return -1;
    return 0;
}

static PyObject *poller_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"on_idle", NULL};
    PyObject *on_idle;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O:UsePoller", names, &on_idle))
        return NULL;
    allocfunc allocate = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    UsePoller *self = (UsePoller *)allocate(type, 0);
    if (self == NULL)
        return NULL;
    Py_INCREF(on_idle);
    self->on_idle = on_idle;
    return (PyObject *)self;
}

static int poller_traverse(PyObject *op, visitproc visit, void *arg)
{
    UsePoller *self = (UsePoller *)op;
    Py_VISIT(Py_TYPE(op));
    Py_VISIT(self->on_idle);
    for (int level = 0; level <= LEVELS; level++)
        for (size_t at = 0; at < self->levels[level].count; at++)
            Py_VISIT(self->levels[level].items[(self->levels[level].first + at) % self->levels[level].capacity]);
    return 0;
}

static void drop_all(UsePoller *self)
{
    for (int level = 0; level <= LEVELS; level++)
        for (Block *block; (block = pop(&self->levels[level])) != NULL; Py_DECREF(block))
            block->is_polled = 0;
}

static int poller_clear(PyObject *op)
{
    drop_all((UsePoller *)op);
    Py_CLEAR(((UsePoller *)op)->on_idle);
    return 0;
}

static void poller_dealloc(PyObject *op)
{
    PyObject_GC_UnTrack(op);
    poller_clear(op);
    for (int level = 0; level <= LEVELS; level++)
        free(((UsePoller *)op)->levels[level].items);
    free_object(op);
}

static PyObject *add(PyObject *self, PyObject *block)
{
    if (!is_block(block) || poller_add((UsePoller *)self, (Block *)block) < 0)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *release(PyObject *self, PyObject *block)
{
    if (!is_block(block))
        return NULL;
    int done = try_release((UsePoller *)self, (Block *)block);
    if (done < 0 || (!done && poller_add((UsePoller *)self, (Block *)block) < 0))
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *poll(PyObject *self, PyObject *new_tensors)
{
    Py_ssize_t count = PyLong_AsSsize_t(new_tensors);
    if ((count == -1 && PyErr_Occurred()) || poller_poll((UsePoller *)self, count) < 0)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *poll_all(PyObject *op, PyObject *limit)
{
    UsePoller *self = (UsePoller *)op;
    size_t most = PyLong_AsSize_t(limit);
    if (most == (size_t)-1 && PyErr_Occurred())
        return NULL;
    for (int level = LEVELS; level >= 0; level--)
        if (poll_level(self, level, level < LEVELS ? level + 1 : LEVELS, level == LEVELS ? most : self->levels[level].count) <
            0)
            return NULL;
    Py_RETURN_NONE;
}

static PyObject *clear(PyObject *self, PyObject *unused)
{
    (void)unused;
    drop_all((UsePoller *)self);
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"add", add, METH_O, NULL},
    {"release", release, METH_O, NULL},
    {"poll", poll, METH_O, NULL},
    {"poll_all", poll_all, METH_O, NULL},
    {"clear", clear, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_new, poller_new},
    {Py_tp_dealloc, poller_dealloc},
    {Py_tp_traverse, poller_traverse},
    {Py_tp_clear, poller_clear},
    {Py_tp_methods, methods},
    {0, NULL},
};

static PyType_Spec spec = {
    .name = "torchwq._native._core.UsePoller",
    .basicsize = sizeof(UsePoller),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .slots = slots,
};

int add_poller(PyObject *module)
{
    UsePoller_Type = add_type(module, &spec);
    return UsePoller_Type == NULL ? -1 : 0;
}
