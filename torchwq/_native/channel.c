/* Writes and reads small items of a channel between processes, and counts them. Its twins, which say what all this is for:
 * channels/fast_send.py, channels/fast_receive.py, peers/shared_words.py.
 *
 * Reading here takes the descriptors that an item brings, so it is no attempt of Note [Receiving without descriptors]:
 * an item counts as an attempt when it has been taken.
 *
 * Invariants:
 *
 * * Between the look at the state of the channel and the system call nothing else runs in this process.
 * * `SharedWord.address` is 0 from when its memory is given up: its slot may be another process's then.
 */

#include "core.h"

#include <string.h>

/* --- a word in shared memory --- */

/* A word of this process's: no other process writes it while there is an address. */
typedef struct {
    PyObject_HEAD
    uint64_t *address; /* NULL once the memory is given up */
    PyObject *memory;  /* keeps it mapped */
} SharedWord;

static PyTypeObject *SharedWord_Type;

static SharedWord *as_word(PyObject *object)
{
    return object != NULL && PyObject_TypeCheck(object, SharedWord_Type) ? (SharedWord *)object : NULL;
}

/* Others see the new value after all that was written before. */
static void add_one(SharedWord *self)
{
    if (self->address != NULL)
        __atomic_store_n(self->address, *self->address + 1, __ATOMIC_RELEASE);
}

static uint64_t value_of(const SharedWord *self)
{
    return self->address == NULL ? 0 : __atomic_load_n(self->address, __ATOMIC_ACQUIRE);
}

static PyObject *word_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    unsigned long long address;
    PyObject *mapping;
    if ((kwargs != NULL && PyDict_Size(kwargs)) || !PyArg_ParseTuple(args, "KO", &address, &mapping)) {
        PyErr_SetString(PyExc_TypeError, "SharedWord() takes an address and what keeps the memory mapped");
        return NULL;
    }
    SharedWord *self = (SharedWord *)PyType_GenericAlloc(type, 0);
    if (self == NULL)
        return NULL;
    Py_INCREF(mapping);
    self->address = (uint64_t *)(uintptr_t)address, self->memory = mapping;
    return (PyObject *)self;
}

static PyObject *word_call(PyObject *op, PyObject *args, PyObject *kwargs)
{
    (void)args, (void)kwargs;
    SharedWord *self = (SharedWord *)op;
    if (self->address == NULL) {
        PyErr_SetString(PyExc_ValueError, "this memory is given up");
        return NULL;
    }
    add_one(self);
    Py_RETURN_NONE;
}

static int word_traverse(PyObject *op, visitproc visit, void *arg)
{
    SharedWord *self = (SharedWord *)op;
    Py_VISIT(Py_TYPE(op));
    Py_VISIT(self->memory);
    return 0;
}

static int word_clear(PyObject *op)
{
    SharedWord *self = (SharedWord *)op;
    self->address = NULL;
    Py_CLEAR(self->memory);
    return 0;
}

static void word_dealloc(PyObject *op)
{
    PyObject_GC_UnTrack(op);
    word_clear(op);
    free_object(op);
}

static PyObject *word_close(PyObject *op, PyObject *unused)
{
    (void)unused;
    word_clear(op);
    Py_RETURN_NONE;
}

static PyMethodDef word_methods[] = {
    {"close", word_close, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot word_slots[] = {
    {Py_tp_new, word_new},
    {Py_tp_call, word_call},
    {Py_tp_dealloc, word_dealloc},
    {Py_tp_traverse, word_traverse},
    {Py_tp_clear, word_clear},
    {Py_tp_methods, word_methods},
    {0, NULL},
};

static PyType_Spec word_spec = {
    .name = "torchwq._native._core.SharedWord",
    .basicsize = sizeof(SharedWord),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .slots = word_slots,
};

/* --- writing --- */

/* channels.fast_send.FastSender derives from this. */
typedef struct {
    PyObject_HEAD
    PyObject *outbox;
    PyObject *endpoint;
    PyObject *sent;          /* SharedWord */
    PyObject *closed;        /* SharedWord */
    PyObject *open;          /* what is returned for an item that has left */
    PyObject *write_any;     /* write_any(obj) */
    PyObject *write_encoded; /* write_encoded(payload) */
    Py_ssize_t max_payload;
    char is_active;
} Sender;

static PyObject *try_write(PyObject *op, PyObject *obj)
{
    Sender *self = (Sender *)op;
    SharedWord *sent = as_word(self->sent), *closed = as_word(self->closed);
    if (self->write_any == NULL || self->write_encoded == NULL || self->open == NULL) {
        PyErr_SetString(PyExc_RuntimeError, "this object is not complete");
        return NULL;
    }
    if (!self->is_active || sent == NULL || closed == NULL || !is_seqpacket(self->endpoint))
        return PyObject_CallFunctionObjArgs(self->write_any, obj, NULL);
    PyObject *payload = builtin_dumps(obj, self->max_payload), *result;
    if (payload == NULL)
        return NULL;
    if (payload == Py_None)
        result = PyObject_CallFunctionObjArgs(self->write_any, obj, NULL);
    else if (outbox_is_idle(self->outbox) && !value_of(closed) && seqpacket_send(self->endpoint, payload, NULL) == 1) {
        add_one(sent);
        Py_INCREF(self->open);
        result = self->open;
    } else if (!PyErr_Occurred())
        result = PyObject_CallFunctionObjArgs(self->write_encoded, payload, NULL);
    else
        result = NULL;
    Py_DECREF(payload);
    return result;
}

#define SENDER_FIELDS(_) _(outbox) _(endpoint) _(sent) _(closed) _(open) _(write_any) _(write_encoded)
DEFINE_GC(sender, Sender, SENDER_FIELDS)

static PyMethodDef sender_methods[] = {
    {"try_write", try_write, METH_O, NULL},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef sender_members[] = {
    {"outbox", T_OBJECT, offsetof(Sender, outbox), 0, NULL},
    {"endpoint", T_OBJECT, offsetof(Sender, endpoint), 0, NULL},
    {"sent", T_OBJECT, offsetof(Sender, sent), 0, NULL},
    {"closed", T_OBJECT, offsetof(Sender, closed), 0, NULL},
    {"open", T_OBJECT, offsetof(Sender, open), 0, NULL},
    {"write_any", T_OBJECT, offsetof(Sender, write_any), 0, NULL},
    {"write_encoded", T_OBJECT, offsetof(Sender, write_encoded), 0, NULL},
    {"max_payload", T_PYSSIZET, offsetof(Sender, max_payload), 0, NULL},
    {"is_active", T_BOOL, offsetof(Sender, is_active), 0, NULL},
    {NULL, 0, 0, 0, NULL},
};

DEFINE_BASE(sender, Sender, "SenderFields")

/* --- reading --- */

/* channels.fast_receive.FastReceiver derives from this. */
typedef struct {
    PyObject_HEAD
    PyObject *endpoint;
    PyObject *attempts;      /* SharedWord */
    PyObject *taken;         /* SharedWord */
    PyObject *closed;        /* SharedWord */
    PyObject *open_state;    /* what is returned with an item of a channel that is open */
    PyObject *closed_state;  /* and of one that is closed */
    PyObject *read_any;      /* read_any() */
    PyObject *read_received; /* read_received(received) */
    char is_active;
} Receiver;

/* Takes the next message: the item in it, or, where that is pickle's, what `try_receive` gives. 1, 0 if there is none, or
 * -1 with an exception. A function of its own, so that its buffer is gone from the stack when other code runs. */
__attribute__((noinline)) static int take(Receiver *self, PyObject **item, PyObject **received)
{
    char data[MAX_MESSAGE];
    Py_ssize_t size;
    PyObject *fds;
    int found = seqpacket_receive_into(self->endpoint, data, &size, &fds);
    if (found != 1)
        return found;
    *item = size && data[size - 1] == BARE && !PyList_Size(fds) ? builtin_loads(data, size) : NULL;
    *received = NULL;
    if (*item != NULL)
        Py_DECREF(fds);
    else
        *received = pack_received(data, size, fds);
    return *item != NULL || *received != NULL ? 1 : -1;
}

static PyObject *try_read(PyObject *op, PyObject *unused)
{
    (void)unused;
    Receiver *self = (Receiver *)op;
    SharedWord *attempts = as_word(self->attempts), *taken = as_word(self->taken), *closed = as_word(self->closed);
    if (self->read_any == NULL || self->read_received == NULL || self->open_state == NULL || self->closed_state == NULL) {
        PyErr_SetString(PyExc_RuntimeError, "this object is not complete");
        return NULL;
    }
    if (!self->is_active || attempts == NULL || taken == NULL || closed == NULL || !is_seqpacket(self->endpoint))
        return PyObject_CallFunctionObjArgs(self->read_any, NULL);
    PyObject *item, *received, *result;
    int found = take(self, &item, &received);
    if (found < 0 && PyErr_ExceptionMatches(PyExc_EOFError)) { /* the end, or closed by another thread */
        PyErr_Clear();
        return PyObject_CallFunctionObjArgs(self->read_any, NULL);
    }
    if (found < 0)
        return NULL;
    if (!found)
        Py_RETURN_NONE;
    if (item != NULL) {
        add_one(attempts);
        add_one(taken);
        result = PyTuple_Pack(2, value_of(closed) ? self->closed_state : self->open_state, item);
        Py_DECREF(item);
        return result;
    }
    result = PyObject_CallFunctionObjArgs(self->read_received, received, NULL);
    Py_DECREF(received);
    return result;
}

#define RECEIVER_FIELDS(_) \
    _(endpoint) _(attempts) _(taken) _(closed) _(open_state) _(closed_state) _(read_any) _(read_received)
DEFINE_GC(receiver, Receiver, RECEIVER_FIELDS)

static PyMethodDef receiver_methods[] = {
    {"try_read", try_read, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef receiver_members[] = {
    {"endpoint", T_OBJECT, offsetof(Receiver, endpoint), 0, NULL},
    {"attempts", T_OBJECT, offsetof(Receiver, attempts), 0, NULL},
    {"taken", T_OBJECT, offsetof(Receiver, taken), 0, NULL},
    {"closed", T_OBJECT, offsetof(Receiver, closed), 0, NULL},
    {"open_state", T_OBJECT, offsetof(Receiver, open_state), 0, NULL},
    {"closed_state", T_OBJECT, offsetof(Receiver, closed_state), 0, NULL},
    {"read_any", T_OBJECT, offsetof(Receiver, read_any), 0, NULL},
    {"read_received", T_OBJECT, offsetof(Receiver, read_received), 0, NULL},
    {"is_active", T_BOOL, offsetof(Receiver, is_active), 0, NULL},
    {NULL, 0, 0, 0, NULL},
};

DEFINE_BASE(receiver, Receiver, "ReceiverFields")

int add_channel(PyObject *module)
{
    SharedWord_Type = add_type(module, &word_spec);
    if (SharedWord_Type == NULL || add_type(module, &sender_spec) == NULL || add_type(module, &receiver_spec) == NULL)
        return -1;
    return 0;
}
