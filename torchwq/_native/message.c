/* A message before it is sent, and the counting of its references. Its twin: memory/message.py.
 *
 * memory.message.Message derives from this type.
 */

#include "core.h"

static PyTypeObject *MessageFields_Type;
static PyTypeObject *message_type; /* the class in Python */
static PyObject *empty;

Message *as_message(PyObject *payload)
{
    if (!PyObject_TypeCheck(payload, MessageFields_Type))
        return NULL;
    Message *self = (Message *)payload;
    return self->data != NULL && PyBytes_CheckExact(self->data) && self->fds != NULL && self->numbers != NULL ? self : NULL;
}

PyObject *message_new(PyObject *data, PyObject *fds, PyObject *keep, PyObject *numbers, uint64_t nbytes)
{
    Message *self = (Message *)PyType_GenericAlloc(message_type, 0);
    if (self == NULL)
        return NULL;
    Py_INCREF(data), Py_INCREF(fds), Py_INCREF(keep), Py_INCREF(numbers), Py_INCREF(empty);
    self->data = data, self->fds = fds, self->keep = keep, self->numbers = numbers, self->counts_sent = empty;
    self->nbytes = (uint64_t)PyBytes_Size(data) + nbytes;
    self->kind = REFERENCES;
    self->only_blocks = 1;
    return (PyObject *)self;
}

/* Counts the message's references as sent. Without a table here the twin does it, which may find one. */
static int count_references(Message *self)
{
    Py_ssize_t count = self->numbers == NULL ? 0 : PySequence_Size(self->numbers);
    if (count <= 0)
        return (int)count;
    if (memory.counts == NULL || memory.lock == NULL) {
        PyObject *done = PyObject_CallMethod((PyObject *)self, "count_references", NULL);
        Py_XDECREF(done);
        return done == NULL ? -1 : 0;
    }
    if (lock_acquire(memory.lock) < 0)
        return -1;
    int result = 0;
    for (Py_ssize_t index = 0; index < count && !result; index++) {
        PyObject *item = PySequence_GetItem(self->numbers, index);
        uint64_t number = item == NULL ? 0 : PyLong_AsUnsignedLongLong(item);
        Py_XDECREF(item);
        if (PyErr_Occurred())
            result = -1;
        else if (number != UNTRACKED && memory.counts != NULL)
            counts_sent(memory.counts, number);
    }
    memory_unlock();
    return result;
}

static int call_each(Message *self)
{
    Py_ssize_t count = self->counts_sent == NULL ? 0 : PySequence_Size(self->counts_sent);
    for (Py_ssize_t index = 0; index < count; index++) {
        PyObject *function = PySequence_GetItem(self->counts_sent, index);
        PyObject *result = function == NULL ? NULL : PyObject_CallFunction(function, "i", 1);
        Py_XDECREF(function);
        if (result == NULL)
            return -1;
        Py_DECREF(result);
    }
    return count < 0 ? -1 : 0;
}

static PyObject *on_send(PyObject *op, PyObject *unused)
{
    (void)unused;
    if (count_references((Message *)op) < 0 || call_each((Message *)op) < 0)
        return NULL;
    Py_RETURN_NONE;
}

#define MESSAGE_FIELDS(_) _(data) _(fds) _(keep) _(numbers) _(counts_sent)
DEFINE_GC(message, Message, MESSAGE_FIELDS)

static PyMethodDef methods[] = {
    {"on_send", on_send, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef members[] = {
    {"data", T_OBJECT_EX, offsetof(Message, data), 0, NULL},
    {"fds", T_OBJECT_EX, offsetof(Message, fds), 0, NULL},
    {"keep", T_OBJECT_EX, offsetof(Message, keep), 0, NULL},
    {"numbers", T_OBJECT_EX, offsetof(Message, numbers), 0, NULL},
    {"counts_sent", T_OBJECT_EX, offsetof(Message, counts_sent), 0, NULL},
    {"nbytes", T_ULONGLONG, offsetof(Message, nbytes), 0, NULL},
    {"kind", T_INT, offsetof(Message, kind), 0, NULL},
    {"only_blocks", T_BOOL, offsetof(Message, only_blocks), 0, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_dealloc, message_dealloc},
    {Py_tp_traverse, message_traverse},
    {Py_tp_clear, message_clear},
    {Py_tp_methods, methods},
    {Py_tp_members, members},
    {0, NULL},
};

static PyType_Spec spec = {
    .name = "torchwq._native._core.MessageFields",
    .basicsize = sizeof(Message),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_BASETYPE,
    .slots = slots,
};

/* set_message(cls): make messages of this class. */
static PyObject *set_message(PyObject *module, PyObject *cls)
{
    (void)module;
    if (!PyType_Check(cls) || !PyType_IsSubtype((PyTypeObject *)cls, MessageFields_Type)) {
        PyErr_SetString(PyExc_TypeError, "a class that derives from MessageFields was expected");
        return NULL;
    }
    Py_INCREF(cls);
    message_type = (PyTypeObject *)cls;
    Py_RETURN_NONE;
}

static PyMethodDef functions[] = {
    {"set_message", set_message, METH_O, NULL},
    {NULL, NULL, 0, NULL},
};

int add_message(PyObject *module)
{
    empty = PyTuple_New(0);
    MessageFields_Type = empty == NULL ? NULL : add_type(module, &spec);
    return MessageFields_Type == NULL ? -1 : add_functions(module, functions);
}
