/* Sends one message if nothing is in the way: no other thread sends, nothing waits, the socket has room. Its twin, and
 * all else: transport/outbox.py, whose Note [One sending thread] holds here.
 *
 * Invariant: this file calls Python code only while it has claimed `sending_thread`, or before it has done anything. So
 * whoever sends in the middle of it submits its message, which is sent at the end.
 */

#include "core.h"

#include <string.h>

/* transport.outbox.Outbox derives from this. */
typedef struct {
    PyObject_HEAD
    PyObject *endpoint;
    PyObject *submitted; /* deque */
    PyObject *pending;   /* deque */
    PyObject *promises;  /* None, or a sender's side of Note [in-band promises] */
    PyObject *on_sent;   /* None, or on_sent(tag, data) */
    unsigned long sending_thread;
    long long number; /* of the message that was sent or became pending last */
    char numbered;
    char needs_flush;
    char is_closed;
    char is_broken;
} Outbox;

/* memory.promises.SentBlocks derives from this. */
typedef struct {
    PyObject_HEAD
    PyObject *sent;      /* set of numbers */
    PyObject *recent;    /* set of numbers */
    PyObject *uncertain; /* set of numbers */
    PyObject *words;     /* sequence of int */
    PyObject *seen_losses;
    Py_ssize_t loss_index;
} SentBlocks;

static PyTypeObject *Outbox_Type, *SentBlocks_Type;
static PyObject *empty;

/* Whether the reader has all blocks of the message, and no loss is to be looked at: 1, 0, or -1 with an exception. */
static int all_are_kept(SentBlocks *self, PyObject *numbers)
{
    if (self->sent == NULL || self->recent == NULL || self->uncertain == NULL || self->words == NULL ||
        PySet_Size(self->uncertain) != 0) {
        PyErr_Clear();
        return 0;
    }
    PyObject *losses = PySequence_GetItem(self->words, self->loss_index);
    if (losses == NULL)
        return -1;
    int same = self->seen_losses == NULL ? 0 : PyObject_RichCompareBool(losses, self->seen_losses, Py_EQ);
    Py_DECREF(losses);
    if (same != 1)
        return same;
    Py_ssize_t count = PySequence_Size(numbers);
    for (int turn = 0; turn < 2; turn++) /* first look, then note */
        for (Py_ssize_t index = 0; index < count; index++) {
            PyObject *number = PySequence_GetItem(numbers, index);
            int found = number == NULL ? -1
                        : turn         ? (PySet_Add(self->recent, number) < 0 ? -1 : 1)
                                       : PySet_Contains(self->sent, number);
            Py_XDECREF(number);
            if (found != 1)
                return found;
        }
    return count < 0 ? -1 : 1;
}

/* Chooses which descriptors go along, and the number in the trailer: both are new references. */
static int choose(Outbox *self, PyObject *payload, Message *message, PyObject **fds, uint64_t *number)
{
    if (message->only_blocks && PyObject_TypeCheck(self->promises, SentBlocks_Type)) {
        int kept = all_are_kept((SentBlocks *)self->promises, message->numbers);
        if (kept < 0)
            return -1;
        if (kept) {
            Py_INCREF(empty);
            *fds = empty, *number = 0;
            return 0;
        }
    }
    PyObject *chosen = PyObject_CallMethod(self->promises, "choose", "(O)", payload);
    if (chosen == NULL)
        return -1;
    PyObject *descriptors;
    unsigned long long value;
    int result = PyArg_ParseTuple(chosen, "OK", &descriptors, &value) ? 0 : -1;
    if (!result) {
        Py_INCREF(descriptors);
        *fds = descriptors, *number = value;
    }
    Py_DECREF(chosen);
    return result;
}

/* The payload's bytes and a trailer: a new reference. */
static PyObject *with_trailer(PyObject *data, uint64_t number, int kind)
{
    Py_ssize_t size = PyBytes_Size(data);
    PyObject *result = size < 0 ? NULL : PyBytes_FromStringAndSize(NULL, size + TRAILER);
    if (result == NULL)
        return NULL;
    char *bytes = PyBytes_AsString(result);
    memcpy(bytes, PyBytes_AsString(data), (size_t)size);
    memcpy(bytes + size, &number, 8);
    bytes[size + 8] = (char)kind;
    return result;
}

static PyObject *send_slowly(PyObject *self, PyObject *payload)
{
    return PyObject_CallMethod(self, "send_counted", "(O)", payload);
}

/* After the socket has taken the message. */
static int note_sent(Outbox *self, PyObject *payload, PyObject *data, uint64_t promised)
{
    PyObject *result;
    if (promised) {
        result = PyObject_CallMethod(self->promises, "note_promise", "(O)", payload);
        if (result == NULL)
            return -1;
        Py_DECREF(result);
    }
    if (self->on_sent == NULL || self->on_sent == Py_None)
        return 0;
    PyObject *tag = self->numbered ? PyLong_FromLongLong(self->number) : PyLong_FromUnsignedLong(PyThread_get_thread_ident());
    result = tag == NULL ? NULL : PyObject_CallFunctionObjArgs(self->on_sent, tag, data, NULL);
    Py_XDECREF(tag);
    Py_XDECREF(result);
    return result == NULL ? -1 : 0;
}

/* Sends the message: 1 if it has left, 0 if the twin has to try, or -1 with an exception. */
static int try_to_send(Outbox *self, PyObject *payload, Message *message)
{
    PyObject *fds = empty, *data;
    uint64_t promised = 0, number = self->numbered ? (uint64_t)self->number + 1 : 0;
    Py_INCREF(fds);
    if (message == NULL) {
        Py_INCREF(payload);
        data = payload;
        if (self->numbered) {
            Py_DECREF(payload);
            data = with_trailer(payload, number, PICKLE);
        }
    } else {
        Py_DECREF(fds);
        if (self->promises != NULL && self->promises != Py_None) {
            if (choose(self, payload, message, &fds, &promised) < 0)
                return -1;
            number = promised;
        } else {
            fds = message->fds;
            Py_INCREF(fds);
        }
        data = with_trailer(message->data, number, message->kind);
    }
    int result = data == NULL ? -1 : seqpacket_send(self->endpoint, data, fds);
    Py_DECREF(fds);
    if (result == 1) {
        if (self->numbered)
            self->number++;
        if (note_sent(self, payload, data, promised) < 0)
            result = -1;
    }
    Py_XDECREF(data);
    return result;
}

bool outbox_is_idle(PyObject *outbox)
{
    Outbox *self = (Outbox *)outbox;
    return outbox != NULL && PyObject_TypeCheck(outbox, Outbox_Type) && !self->sending_thread && self->submitted != NULL &&
           self->pending != NULL && PyObject_Size(self->submitted) == 0 && PyObject_Size(self->pending) == 0;
}

static PyObject *send(PyObject *op, PyObject *payload)
{
    Outbox *self = (Outbox *)op;
    Message *message = NULL;
    if (!PyBytes_CheckExact(payload)) {
        message = as_message(payload);
        PyObject *counted = PyObject_CallMethod(payload, "on_send", NULL);
        if (counted == NULL)
            return NULL;
        Py_DECREF(counted);
        if (message == NULL)
            return send_slowly(op, payload);
    }
    if (self->needs_flush || self->is_closed || self->is_broken || !outbox_is_idle(op) || !is_seqpacket(self->endpoint))
        return send_slowly(op, payload);
    self->sending_thread = PyThread_get_thread_ident();
    int sent = try_to_send(self, payload, message);
    self->sending_thread = 0;
    PyObject *result = NULL;
    if (sent == 1) {
        Py_INCREF(Py_None);
        result = Py_None;
    } else if (!sent)
        result = send_slowly(op, payload);
    if (self->needs_flush || PyObject_Size(self->submitted)) {
        PyObject *type, *value, *traceback;
        PyErr_Fetch(&type, &value, &traceback);
        PyObject *processed = PyObject_CallMethod(op, "process", NULL);
        Py_XDECREF(processed);
        if (processed == NULL) {
            Py_CLEAR(result);
            Py_XDECREF(type), Py_XDECREF(value), Py_XDECREF(traceback);
        } else
            PyErr_Restore(type, value, traceback);
    }
    return result;
}

#define OUTBOX_FIELDS(_) _(endpoint) _(submitted) _(pending) _(promises) _(on_sent)
DEFINE_GC(outbox, Outbox, OUTBOX_FIELDS)

static PyMethodDef outbox_methods[] = {
    {"send", send, METH_O, NULL},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef outbox_members[] = {
    {"endpoint", T_OBJECT, offsetof(Outbox, endpoint), 0, NULL},
    {"submitted", T_OBJECT, offsetof(Outbox, submitted), 0, NULL},
    {"pending", T_OBJECT, offsetof(Outbox, pending), 0, NULL},
    {"promises", T_OBJECT, offsetof(Outbox, promises), 0, NULL},
    {"on_sent", T_OBJECT, offsetof(Outbox, on_sent), 0, NULL},
    {"sending_thread", T_ULONG, offsetof(Outbox, sending_thread), 0, NULL},
    {"number", T_LONGLONG, offsetof(Outbox, number), 0, NULL},
    {"numbered", T_BOOL, offsetof(Outbox, numbered), 0, NULL},
    {"needs_flush", T_BOOL, offsetof(Outbox, needs_flush), 0, NULL},
    {"is_closed", T_BOOL, offsetof(Outbox, is_closed), 0, NULL},
    {"is_broken", T_BOOL, offsetof(Outbox, is_broken), 0, NULL},
    {NULL, 0, 0, 0, NULL},
};

DEFINE_BASE(outbox, Outbox, "OutboxFields")

#define SENT_FIELDS(_) _(sent) _(recent) _(uncertain) _(words) _(seen_losses)
DEFINE_GC(sent, SentBlocks, SENT_FIELDS)

static PyMemberDef sent_members[] = {
    {"sent", T_OBJECT, offsetof(SentBlocks, sent), 0, NULL},
    {"recent", T_OBJECT, offsetof(SentBlocks, recent), 0, NULL},
    {"uncertain", T_OBJECT, offsetof(SentBlocks, uncertain), 0, NULL},
    {"words", T_OBJECT, offsetof(SentBlocks, words), 0, NULL},
    {"seen_losses", T_OBJECT, offsetof(SentBlocks, seen_losses), 0, NULL},
    {"loss_index", T_PYSSIZET, offsetof(SentBlocks, loss_index), 0, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot sent_slots[] = {
    {Py_tp_dealloc, sent_dealloc},
    {Py_tp_traverse, sent_traverse},
    {Py_tp_clear, sent_clear},
    {Py_tp_members, sent_members},
    {0, NULL},
};

static PyType_Spec sent_spec = {
    .name = "torchwq._native._core.SentFields",
    .basicsize = sizeof(SentBlocks),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_BASETYPE,
    .slots = sent_slots,
};

int add_outbox(PyObject *module)
{
    empty = PyTuple_New(0);
    Outbox_Type = add_type(module, &outbox_spec);
    SentBlocks_Type = add_type(module, &sent_spec);
    return empty == NULL || Outbox_Type == NULL || SentBlocks_Type == NULL ? -1 : 0;
}
