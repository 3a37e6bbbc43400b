/* Pickles objects of exact built-in types, and reads such pickles: the messages without tensors. Its twin is pickle itself,
 * of which this file writes the very bytes, so that either side may be a twin.
 *
 * A pickler of its own costs less than to call pickle's: most messages are a few numbers and strings, and pickle makes
 * a pickler, a memo and a buffer for each.
 *
 * Invariants:
 *
 * * Writing calls nothing that could run other Python code, so the object stays as it is meanwhile.
 * * Reading believes no byte before it has checked it. What it does not know, or cannot do, it leaves to pickle, from the
 *   beginning: nobody has seen what it has made by then.
 *
 * Source: pickletools, for the opcodes; Modules/_pickle.c in CPython, for which of them stands for what.
 */

#include "core.h"

#include <string.h>

#define MAX_DEPTH 8
#define MAX_MEMO 128
#define MEMO_SLOTS 256  /* at least twice as many */
#define MAX_BYTES 32768
#define MAX_STACK 1024
#define MAX_MARKS 16
#define BATCH 1000      /* items of a list or dict for each APPENDS or SETITEMS, as pickle has it */
#define MIN_FRAME 4     /* bytes: a shorter pickle has no frame */
#define HEADER 2        /* bytes of PROTO */
#define FRAME_HEADER 9

enum {
    PROTO = 0x80, FRAME = 0x95, STOP = '.', MARK = '(', MEMOIZE = 0x94, BINGET = 'h',
    NONE = 'N', NEWTRUE = 0x88, NEWFALSE = 0x89, BININT1 = 'K', BININT2 = 'M', BININT = 'J', LONG1 = 0x8a, BINFLOAT = 'G',
    SHORT_BINUNICODE = 0x8c, BINUNICODE = 'X', SHORT_BINBYTES = 'C', BINBYTES = 'B',
    EMPTY_TUPLE = ')', TUPLE1 = 0x85, TUPLE2 = 0x86, TUPLE3 = 0x87, TUPLE = 't',
    EMPTY_LIST = ']', APPEND = 'a', APPENDS = 'e', EMPTY_DICT = '}', SETITEM = 's', SETITEMS = 'u',
};

/* --- writing --- */

typedef struct {
    unsigned char *at, *end;
    int memoized;
    PyObject *memo[MAX_MEMO];
    unsigned char slots[MEMO_SLOTS]; /* index into `memo` plus one, by address; 0 if there is none */
} Pickler;

static bool write_object(Pickler *self, PyObject *obj, int depth);

static bool put(Pickler *self, int opcode)
{
    if (self->at >= self->end)
        return false;
    *self->at++ = (unsigned char)opcode;
    return true;
}

/* An opcode, its argument's `size` lowest bytes, and as many bytes of data. */
static bool put_with(Pickler *self, int opcode, uint64_t argument, size_t size, const void *data, size_t length)
{
    if ((size_t)(self->end - self->at) < 1 + size + length)
        return false;
    *self->at++ = (unsigned char)opcode;
    memcpy(self->at, &argument, size); /* little-endian, as the machines are that have this part */
    self->at += size;
    if (length)
        memcpy(self->at, data, length);
    self->at += length;
    return true;
}

static size_t slot_of(const Pickler *self, PyObject *obj)
{
    size_t slot = (size_t)((uintptr_t)obj >> 4) * 0x9E3779B1u >> 8 & (MEMO_SLOTS - 1);
    while (self->slots[slot] && self->memo[self->slots[slot] - 1] != obj)
        slot = (slot + 1) & (MEMO_SLOTS - 1);
    return slot;
}

static bool memoize(Pickler *self, PyObject *obj)
{
    size_t slot = slot_of(self, obj);
    if (self->slots[slot] || self->memoized == MAX_MEMO) /* a tuple that has itself in it, or too many objects */
        return false;
    self->memo[self->memoized++] = obj;
    self->slots[slot] = (unsigned char)self->memoized;
    return put(self, MEMOIZE);
}

static bool write_int(Pickler *self, PyObject *obj)
{
    int overflow;
    long long value = PyLong_AsLongLongAndOverflow(obj, &overflow);
    if (overflow)
        return false;
    if (value >= 0 && value <= 0xff)
        return put_with(self, BININT1, (uint64_t)value, 1, NULL, 0);
    if (value >= 0 && value <= 0xffff)
        return put_with(self, BININT2, (uint64_t)value, 2, NULL, 0);
    if (value >= INT32_MIN && value <= INT32_MAX)
        return put_with(self, BININT, (uint64_t)value, 4, NULL, 0);
    size_t size = 8; /* as few bytes as show the sign */
    while (size > 1 && value >> (8 * size - 9) == (value < 0 ? -1 : 0))
        size--;
    return put_with(self, LONG1, size, 1, &value, size);
}

static bool write_float(Pickler *self, PyObject *obj)
{
    double value = PyFloat_AsDouble(obj);
    uint64_t bits;
    memcpy(&bits, &value, 8);
    return put_with(self, BINFLOAT, __builtin_bswap64(bits), 8, NULL, 0);
}

static bool write_bytes(Pickler *self, PyObject *obj, const char *data, Py_ssize_t size, int short_opcode, int opcode)
{
    return put_with(self, size < 256 ? short_opcode : opcode, (uint64_t)size, size < 256 ? 1 : 4, data, (size_t)size) &&
           memoize(self, obj);
}

static bool write_str(Pickler *self, PyObject *obj)
{
    Py_ssize_t size = PyUnicode_GetLength(obj);
    if (size > self->end - self->at)
        return false;
    const char *data = PyUnicode_AsUTF8AndSize(obj, &size);
    if (data == NULL) { /* half of a surrogate pair */
        PyErr_Clear();
        return false;
    }
    return write_bytes(self, obj, data, size, SHORT_BINUNICODE, BINUNICODE);
}

static bool write_tuple(Pickler *self, PyObject *obj, int depth)
{
    static const int opcodes[] = {EMPTY_TUPLE, TUPLE1, TUPLE2, TUPLE3};
    Py_ssize_t size = PyTuple_Size(obj);
    if (size == 0)
        return put(self, EMPTY_TUPLE);
    if (size > 3 && !put(self, MARK))
        return false;
    for (Py_ssize_t index = 0; index < size; index++)
        if (!write_object(self, PyTuple_GetItem(obj, index), depth))
            return false;
    return put(self, size > 3 ? TUPLE : opcodes[size]) && memoize(self, obj);
}

static bool write_list(Pickler *self, PyObject *obj, int depth)
{
    Py_ssize_t size = PyList_Size(obj), index = 0;
    if (!put(self, EMPTY_LIST) || !memoize(self, obj))
        return false;
    if (size == 1)
        return write_object(self, PyList_GetItem(obj, 0), depth) && put(self, APPEND);
    while (index < size) {
        Py_ssize_t until = size - index < BATCH ? size : index + BATCH;
        if (!put(self, MARK))
            return false;
        for (; index < until; index++)
            if (!write_object(self, PyList_GetItem(obj, index), depth))
                return false;
        if (!put(self, APPENDS))
            return false;
    }
    return true;
}

static bool write_dict(Pickler *self, PyObject *obj, int depth)
{
    Py_ssize_t size = PyDict_Size(obj), at = 0, written;
    PyObject *key, *value;
    if (!put(self, EMPTY_DICT) || !memoize(self, obj))
        return false;
    if (size == 1)
        return PyDict_Next(obj, &at, &key, &value) && write_object(self, key, depth) &&
               write_object(self, value, depth) && put(self, SETITEM);
    do {
        if (size == 0 || !put(self, MARK))
            return size == 0;
        for (written = 0; written < BATCH && PyDict_Next(obj, &at, &key, &value); written++)
            if (!write_object(self, key, depth) || !write_object(self, value, depth))
                return false;
        if (!put(self, SETITEMS))
            return false;
    } while (written == BATCH); /* after a full batch comes another one, if an empty one, as pickle has it */
    return true;
}

static bool write_object(Pickler *self, PyObject *obj, int depth)
{
    PyTypeObject *cls = Py_TYPE(obj);
    if (cls == &PyLong_Type)
        return write_int(self, obj);
    if (cls == &PyFloat_Type)
        return write_float(self, obj);
    if (obj == Py_None)
        return put(self, NONE);
    if (cls == &PyBool_Type)
        return put(self, obj == Py_True ? NEWTRUE : NEWFALSE);
    bool is_container = cls == &PyTuple_Type || cls == &PyList_Type || cls == &PyDict_Type;
    if ((!is_container && cls != &PyUnicode_Type && cls != &PyBytes_Type) || depth > MAX_DEPTH)
        return false;
    int known = self->slots[slot_of(self, obj)];
    if (known)
        return put_with(self, BINGET, (uint64_t)known - 1, 1, NULL, 0);
    if (cls == &PyUnicode_Type)
        return write_str(self, obj);
    if (cls == &PyTuple_Type)
        return write_tuple(self, obj, depth + 1);
    if (cls == &PyList_Type)
        return write_list(self, obj, depth + 1);
    if (cls == &PyDict_Type)
        return write_dict(self, obj, depth + 1);
    return write_bytes(self, obj, PyBytes_AsString(obj), PyBytes_Size(obj), SHORT_BINBYTES, BINBYTES);
}

PyObject *builtin_dumps(PyObject *obj, Py_ssize_t limit)
{
    unsigned char buffer[HEADER + FRAME_HEADER + MAX_BYTES], *begin = buffer + HEADER + FRAME_HEADER;
    Pickler pickler;
    pickler.memoized = 0;
    memset(pickler.slots, 0, sizeof pickler.slots);
    pickler.at = begin, pickler.end = begin + MAX_BYTES;
    if (!write_object(&pickler, obj, 0) || !put(&pickler, STOP))
        Py_RETURN_NONE;
    uint64_t size = (uint64_t)(pickler.at - begin);
    if (size >= MIN_FRAME) {
        memcpy(begin -= 8, &size, 8);
        *--begin = FRAME;
    }
    *--begin = 5;
    *--begin = PROTO;
    Py_ssize_t length = pickler.at - begin;
    if (length > limit)
        Py_RETURN_NONE;
    return PyBytes_FromStringAndSize((char *)begin, length);
}

/* --- reading --- */

typedef struct {
    const unsigned char *at, *end;
    int depth, marks, memoized;
    int mark[MAX_MARKS];
    PyObject *stack[MAX_STACK]; /* owned */
    PyObject *memo[MAX_MEMO];   /* owned */
} Unpickler;

/* Takes over `obj`, also if it fails. */
static bool push(Unpickler *self, PyObject *obj)
{
    if (obj == NULL || self->depth == MAX_STACK) {
        Py_XDECREF(obj);
        return false;
    }
    self->stack[self->depth++] = obj;
    return true;
}

static bool push_known(Unpickler *self, PyObject *obj)
{
    Py_INCREF(obj);
    return push(self, obj);
}

/* The next `size` bytes as a number; they must be there. */
static bool get(Unpickler *self, size_t size, uint64_t *value)
{
    if ((size_t)(self->end - self->at) < size)
        return false;
    *value = 0;
    memcpy(value, self->at, size);
    self->at += size;
    return true;
}

/* The bytes of an object whose length comes first, in `size` bytes. */
static const char *get_counted(Unpickler *self, size_t size, Py_ssize_t *length)
{
    uint64_t value;
    if (!get(self, size, &value) || value > (uint64_t)(self->end - self->at))
        return NULL;
    const char *bytes = (const char *)self->at;
    self->at += value;
    *length = (Py_ssize_t)value;
    return bytes;
}

static bool read_long(Unpickler *self)
{
    Py_ssize_t size;
    const char *bytes = get_counted(self, 1, &size);
    if (bytes == NULL || size < 1 || size > 8)
        return false;
    int64_t value = bytes[size - 1] & 0x80 ? -1 : 0;
    memcpy(&value, bytes, (size_t)size);
    return push(self, PyLong_FromLongLong(value));
}

/* Whether the objects from `first` on are the last ones since the mark. */
static bool are_since_mark(const Unpickler *self, int first)
{
    return first <= self->depth && first >= (self->marks ? self->mark[self->marks - 1] : 0);
}

/* Drops the last objects, from `first` on. */
static void drop(Unpickler *self, int first)
{
    while (self->depth > first)
        Py_DECREF(self->stack[--self->depth]);
}

/* Replaces the last objects, from `first` on, by a tuple of them. */
static bool read_tuple(Unpickler *self, int first)
{
    PyObject *tuple = are_since_mark(self, first) ? PyTuple_New(self->depth - first) : NULL;
    if (tuple == NULL)
        return false;
    for (int index = first; index < self->depth; index++)
        PyTuple_SetItem(tuple, index - first, self->stack[index]); /* takes it over */
    self->depth = first;
    return push(self, tuple);
}

/* Adds the last objects, from `first` on, to the list before them. */
static bool read_items(Unpickler *self, int first)
{
    if (!are_since_mark(self, first - 1) || !PyList_CheckExact(self->stack[first - 1]))
        return false;
    for (int index = first; index < self->depth; index++)
        if (PyList_Append(self->stack[first - 1], self->stack[index]) < 0)
            return false;
    drop(self, first);
    return true;
}

/* Adds the last objects, from `first` on, to the dict before them: keys and values in turn. */
static bool read_pairs(Unpickler *self, int first)
{
    if (!are_since_mark(self, first - 1) || !PyDict_CheckExact(self->stack[first - 1]) || (self->depth - first) % 2)
        return false;
    for (int index = first; index < self->depth; index += 2)
        if (PyDict_SetItem(self->stack[first - 1], self->stack[index], self->stack[index + 1]) < 0)
            return false;
    drop(self, first);
    return true;
}

static bool read_memoize(Unpickler *self)
{
    if (!are_since_mark(self, self->depth - 1) || self->memoized == MAX_MEMO)
        return false;
    PyObject *obj = self->stack[self->depth - 1];
    Py_INCREF(obj);
    self->memo[self->memoized++] = obj;
    return true;
}

/* Obeys one opcode. */
static bool read_opcode(Unpickler *self, int opcode)
{
    uint64_t value = 0;
    Py_ssize_t length;
    const char *bytes;
    double number;
    switch (opcode) {
    case NONE:
        return push_known(self, Py_None);
    case NEWTRUE:
        return push_known(self, Py_True);
    case NEWFALSE:
        return push_known(self, Py_False);
    case BININT1:
        return get(self, 1, &value) && push(self, PyLong_FromUnsignedLongLong(value));
    case BININT2:
        return get(self, 2, &value) && push(self, PyLong_FromUnsignedLongLong(value));
    case BININT:
        return get(self, 4, &value) && push(self, PyLong_FromLong((int32_t)value));
    case LONG1:
        return read_long(self);
    case BINFLOAT:
        if (!get(self, 8, &value))
            return false;
        value = __builtin_bswap64(value);
        memcpy(&number, &value, 8);
        return push(self, PyFloat_FromDouble(number));
    case SHORT_BINUNICODE:
    case BINUNICODE:
        bytes = get_counted(self, opcode == BINUNICODE ? 4 : 1, &length);
        return bytes != NULL && push(self, PyUnicode_DecodeUTF8(bytes, length, NULL));
    case SHORT_BINBYTES:
    case BINBYTES:
        bytes = get_counted(self, opcode == BINBYTES ? 4 : 1, &length);
        return bytes != NULL && push(self, PyBytes_FromStringAndSize(bytes, length));
    case EMPTY_TUPLE:
        return push(self, PyTuple_New(0));
    case EMPTY_LIST:
        return push(self, PyList_New(0));
    case EMPTY_DICT:
        return push(self, PyDict_New());
    case TUPLE1:
    case TUPLE2:
    case TUPLE3:
        return read_tuple(self, self->depth - 1 - (opcode - TUPLE1));
    case APPEND:
        return read_items(self, self->depth - 1);
    case SETITEM:
        return read_pairs(self, self->depth - 2);
    case MEMOIZE:
        return read_memoize(self);
    case BINGET:
        return get(self, 1, &value) && value < (uint64_t)self->memoized && push_known(self, self->memo[value]);
    case MARK:
        if (self->marks == MAX_MARKS)
            return false;
        self->mark[self->marks++] = self->depth;
        return true;
    case TUPLE:
        return self->marks && read_tuple(self, self->mark[--self->marks]);
    case APPENDS:
        return self->marks && read_items(self, self->mark[--self->marks]);
    case SETITEMS:
        return self->marks && read_pairs(self, self->mark[--self->marks]);
    default:
        return false;
    }
}

/* Whether the pickle begins as one of protocol 4 or 5 does. */
static bool read_header(Unpickler *self)
{
    uint64_t value;
    if (!get(self, 2, &value) || (value & 0xff) != PROTO || value >> 8 < 4 || value >> 8 > 5)
        return false;
    if (self->at == self->end || *self->at != FRAME)
        return true;
    self->at++;
    return get(self, 8, &value) && value <= (uint64_t)(self->end - self->at);
}

PyObject *builtin_loads(const char *data, Py_ssize_t size)
{
    Unpickler unpickler, *self = &unpickler;
    PyObject *result = NULL;
    self->at = (const unsigned char *)data, self->end = self->at + size;
    self->depth = self->marks = self->memoized = 0;
    bool known = read_header(self);
    while (known && self->at < self->end) {
        int opcode = *self->at++;
        if (opcode == STOP) {
            if (self->depth == 1 && !self->marks) {
                result = self->stack[0];
                self->depth = 0;
            }
            break;
        }
        known = read_opcode(self, opcode);
    }
    drop(self, 0);
    while (self->memoized)
        Py_DECREF(self->memo[--self->memoized]);
    if (result == NULL)
        PyErr_Clear(); /* pickle meets the error again, and says more */
    return result;
}
