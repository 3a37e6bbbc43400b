/* Counts references in the table of memory/ref_table.py, whose notes say what the words mean and in which order they
 * are read. Its twin: memory/counts.py.
 *
 * Other processes read and write other words of the same memory at the same time. Each word has one writer, which reads
 * and writes it with the lock of the memory room held. So a load and a store are enough where it changes its own word;
 * they are atomic so that others see one word or the other. A store releases what was written before it; a load acquires
 * what the word's writer wrote before it.
 */

#include "core.h"

#include <stdatomic.h>

PyTypeObject *Counts_Type;

/* The layout of counts.py, in words. `counts_new` refuses a table of another length. */
#define ROWS 32768u
#define SLOTS 512u
#define TILE 64u
#define STRIDE (2 * TILE)
#define GENERATIONS 512u
#define TILES (GENERATIONS + ROWS)
#define WORDS_OF_TILE ((uint64_t)ROWS * STRIDE)
#define LENGTH (TILES + SLOTS / TILE * WORDS_OF_TILE)

#define FLAGS (uint64_t)3
#define REFERENCE (uint64_t)4
#define LOW (uint64_t)0xFFFFFFFF
#define COUNT (LOW - FLAGS)

static uint64_t get(const Counts *self, uint64_t index)
{
    return atomic_load_explicit((_Atomic uint64_t *)&self->words[index], memory_order_acquire);
}

static void put(Counts *self, uint64_t index, uint64_t word)
{
    atomic_store_explicit((_Atomic uint64_t *)&self->words[index], word, memory_order_release);
}

/* A number may come from a message, so its row may be anything. After `close` there is no table. */
static bool has_row(const Counts *self, uint64_t number)
{
    return self->words != NULL && (number & LOW) < ROWS;
}

bool counts_is_current(const Counts *self, uint64_t number)
{
    return has_row(self, number) && get(self, GENERATIONS + (number & LOW)) == number >> 32;
}

static void add_reference(Counts *self, uint64_t number, uint64_t index, uint64_t flags)
{
    uint64_t word = get(self, index), generation = number >> 32;
    if (word >> 32 == generation && (word & COUNT) != COUNT)
        put(self, index, (word + REFERENCE) | flags); /* if the number is old, nobody believes the word */
    else if (counts_is_current(self, number)) {
        uint64_t count = word >> 32 == generation ? word & LOW : 0;
        put(self, index, generation << 32 | ((count + REFERENCE) & LOW) | flags);
    }
}

void counts_sent(Counts *self, uint64_t number)
{
    if (has_row(self, number))
        add_reference(self, number, self->first + STRIDE * (number & LOW), 0);
}

void counts_received(Counts *self, uint64_t number, uint64_t flags)
{
    if (has_row(self, number))
        add_reference(self, number, self->first + STRIDE * (number & LOW) + 1, flags);
}

static void set_flag(Counts *self, uint64_t number, uint64_t flag)
{
    if (!has_row(self, number))
        return;
    uint64_t index = self->first + STRIDE * (number & LOW) + 1, word = get(self, index), generation = number >> 32;
    if (word >> 32 == generation)
        put(self, index, word | flag);
    else if (counts_is_current(self, number))
        put(self, index, generation << 32 | flag);
}

void counts_clear_flag(Counts *self, uint64_t number, uint64_t flag)
{
    if (!has_row(self, number))
        return;
    uint64_t index = self->first + STRIDE * (number & LOW) + 1, word = get(self, index);
    if (word >> 32 == number >> 32)
        put(self, index, word & ~flag);
}

static int is_alive(Counts *self, uint64_t slot)
{
    PyObject *number = PyLong_FromUnsignedLongLong(slot);
    if (number == NULL)
        return -1;
    PyObject *alive = PyObject_CallFunctionObjArgs(self->is_alive, number, NULL);
    Py_DECREF(number);
    if (alive == NULL)
        return -1;
    int result = PyObject_IsTrue(alive);
    Py_DECREF(alive);
    return result;
}

static uint64_t index_of(uint64_t slot, uint64_t row)
{
    return TILES + slot / TILE * WORDS_OF_TILE + STRIDE * row + slot % TILE * 2;
}

int counts_state(Counts *self, uint64_t number)
{
    if (!has_row(self, number))
        return STATE_IN_FLIGHT;
    uint64_t used = get(self, 0), row = number & LOW, generation = number >> 32, received = 0, sent = 0;
    if (used > SLOTS)
        used = SLOTS; /* the word is damaged: the other checks still hold */
    for (uint64_t slot = 0; slot < used; slot++) {
        uint64_t word = get(self, index_of(slot, row) + 1);
        if (word >> 32 != generation)
            continue;
        if (word & STATE_ESCAPED)
            return STATE_ESCAPED;
        if (word & STATE_IN_USE) {
            int alive = is_alive(self, slot);
            if (alive)
                return alive < 0 ? -1 : STATE_IN_USE;
            if (!has_row(self, number))
                return STATE_IN_FLIGHT; /* a finalizer has forked meanwhile, and this is the child */
        }
        received += word & ~FLAGS;
    }
    for (uint64_t slot = 0; slot < used; slot++) { /* see Note [order of loads] */
        uint64_t word = get(self, index_of(slot, row));
        if (word >> 32 == generation)
            sent += word;
    }
    return ((sent - received) & LOW) || get(self, 0) != used ? STATE_IN_FLIGHT : STATE_FREE;
}

/* Counts(address, length, slot, is_alive): on `length` words at this address, which outlive it. */
static PyObject *counts_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"address", "length", "slot", "is_alive", NULL};
    unsigned long long address, length, slot;
    PyObject *alive;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "KKKO:Counts", names, &address, &length, &slot, &alive))
        return NULL;
    if (length != LENGTH || slot >= SLOTS || address % sizeof(uint64_t)) {
        PyErr_SetString(PyExc_ValueError, "this is no reference table");
        return NULL;
    }
    allocfunc allocate = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    Counts *self = (Counts *)allocate(type, 0);
    if (self == NULL)
        return NULL;
    self->words = (uint64_t *)(uintptr_t)address;
    self->length = (Py_ssize_t)length;
    self->first = index_of(slot, 0);
    Py_INCREF(alive);
    self->is_alive = alive;
    return (PyObject *)self;
}

#define COUNTS_FIELDS(_) _(is_alive)
DEFINE_GC(counts, Counts, COUNTS_FIELDS)

static bool one_number(PyObject *const *args, Py_ssize_t count, Py_ssize_t wanted, uint64_t *number, uint64_t *other)
{
    *number = *other = 0;
    if (count != wanted) {
        PyErr_Format(PyExc_TypeError, "%zd arguments instead of %zd", count, wanted);
        return false;
    }
    *number = PyLong_AsUnsignedLongLong(args[0]);
    if (wanted == 2 && !PyErr_Occurred())
        *other = PyLong_AsUnsignedLongLong(args[1]);
    return !PyErr_Occurred();
}

static PyObject *count_sent(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    uint64_t number, unused;
    if (!one_number(args, count, 1, &number, &unused))
        return NULL;
    counts_sent((Counts *)self, number);
    Py_RETURN_NONE;
}

static PyObject *count_received(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    uint64_t number, flags;
    if (!one_number(args, count, 2, &number, &flags))
        return NULL;
    counts_received((Counts *)self, number, flags & FLAGS);
    Py_RETURN_NONE;
}

static PyObject *set_flag_method(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    uint64_t number, flag;
    if (!one_number(args, count, 2, &number, &flag))
        return NULL;
    set_flag((Counts *)self, number, flag & FLAGS);
    Py_RETURN_NONE;
}

static PyObject *clear_flag_method(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    uint64_t number, flag;
    if (!one_number(args, count, 2, &number, &flag))
        return NULL;
    counts_clear_flag((Counts *)self, number, flag & FLAGS);
    Py_RETURN_NONE;
}

static PyObject *state_method(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    uint64_t number, unused;
    if (!one_number(args, count, 1, &number, &unused))
        return NULL;
    int state = counts_state((Counts *)self, number);
    return state < 0 ? NULL : PyLong_FromLong(state);
}

static PyObject *is_current_method(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    uint64_t number, unused;
    if (!one_number(args, count, 1, &number, &unused))
        return NULL;
    return PyBool_FromLong(counts_is_current((Counts *)self, number));
}

static PyObject *close_method(PyObject *self, PyObject *unused)
{
    (void)unused;
    ((Counts *)self)->words = NULL;
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"close", close_method, METH_NOARGS, NULL},
    {"count_sent", (PyCFunction)(void (*)(void))count_sent, METH_FASTCALL, NULL},
    {"count_received", (PyCFunction)(void (*)(void))count_received, METH_FASTCALL, NULL},
    {"set_flag", (PyCFunction)(void (*)(void))set_flag_method, METH_FASTCALL, NULL},
    {"clear_flag", (PyCFunction)(void (*)(void))clear_flag_method, METH_FASTCALL, NULL},
    {"state", (PyCFunction)(void (*)(void))state_method, METH_FASTCALL, NULL},
    {"is_current", (PyCFunction)(void (*)(void))is_current_method, METH_FASTCALL, NULL},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_new, counts_new},
    {Py_tp_dealloc, counts_dealloc},
    {Py_tp_traverse, counts_traverse},
    {Py_tp_clear, counts_clear},
    {Py_tp_methods, methods},
    {0, NULL},
};

static PyType_Spec spec = {
    .name = "torchwq._native._core.Counts",
    .basicsize = sizeof(Counts),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .slots = slots,
};

int add_counts(PyObject *module)
{
    Counts_Type = add_type(module, &spec);
    return Counts_Type == NULL ? -1 : 0;
}
