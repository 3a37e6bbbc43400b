/* Takes messages for a queue's owner, for a worker, and for whoever keeps descriptors for senders, as long as nothing is
 * unusual about them, and remembers those that the owner has sent. The twins say what all this is for: memory/promises.py,
 * queues/answers.py, queues/taking.py, queues/history.py.
 */

#include "core.h"

#include <stdatomic.h>
#include <string.h>

/* --- a connection's next message --- */

/* Calls `receive`, an endpoint's method. */
static PyObject *receive_by(PyObject *receive)
{
    PyObject *endpoint = seqpacket_of(receive);
    return endpoint == NULL ? PyObject_CallFunctionObjArgs(receive, NULL) : seqpacket_receive(endpoint);
}

/* The last byte of a message; -1 if it is none. */
static int kind_of(PyObject *received)
{
    char *bytes;
    Py_ssize_t size;
    if (!PyTuple_Check(received) || PyTuple_Size(received) != 2 ||
        PyBytes_AsStringAndSize(PyTuple_GetItem(received, 0), &bytes, &size) < 0 || size < 1) {
        PyErr_Clear();
        return -1;
    }
    return (unsigned char)bytes[size - 1];
}

/* --- kept descriptors --- */

/* memory.promises.KeptBlocks derives from this. */
typedef struct {
    PyObject_HEAD
    PyObject *epoch;
    int kind; /* of a message that may lack descriptors */
    char is_closed;
} KeptBlocks;

static PyTypeObject *KeptBlocks_Type;

/* The next message, ready to be decoded: see `KeptBlocks.take`. */
static PyObject *take_kept(PyObject *op, PyObject *receive)
{
    KeptBlocks *self = (KeptBlocks *)op;
    for (;;) {
        PyObject *received = receive_by(receive), *answer;
        if (received == NULL) {
            if (!PyErr_ExceptionMatches(PyExc_EOFError)) {
                PyObject *type, *value, *traceback;
                PyErr_Fetch(&type, &value, &traceback);
                answer = PyObject_CallMethod(op, "count_loss", NULL);
                Py_XDECREF(answer);
                if (answer == NULL)
                    PyErr_Clear();
                PyErr_Restore(type, value, traceback);
            }
            return NULL;
        }
        int kind = received == Py_None ? BARE : kind_of(received);
        if (kind == BARE || kind == PICKLE)
            return received;
        PyObject *fds = kind < 0 ? NULL : PyTuple_GetItem(received, 1);
        if (kind == self->kind && !self->is_closed && self->epoch != NULL && PyList_Check(fds) && !PyList_Size(fds)) {
            PyObject *epoch = self->epoch; /* that in which the message was taken: allocating may run a finalizer */
            Py_INCREF(epoch);
            answer = PyTuple_Pack(2, PyTuple_GetItem(received, 0), epoch);
            Py_DECREF(epoch);
            Py_DECREF(received);
            return answer;
        }
        answer = PyObject_CallMethod(op, "process_or_count_loss", "(O)", received);
        Py_DECREF(received);
        if (answer == NULL || answer != Py_None)
            return answer;
        Py_DECREF(answer); /* it was one of the protocol's own messages */
    }
}

#define KEPT_FIELDS(_) _(epoch)
DEFINE_GC(kept, KeptBlocks, KEPT_FIELDS)

static PyMethodDef kept_methods[] = {
    {"take", take_kept, METH_O, NULL},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef kept_members[] = {
    {"epoch", T_OBJECT, offsetof(KeptBlocks, epoch), 0, NULL},
    {"kind", T_INT, offsetof(KeptBlocks, kind), 0, NULL},
    {"is_closed", T_BOOL, offsetof(KeptBlocks, is_closed), 0, NULL},
    {NULL, 0, 0, 0, NULL},
};

DEFINE_BASE(kept, KeptBlocks, "KeptFields")

/* --- answers --- */

/* queues.answers.AnswerSocket derives from this. */
typedef struct {
    PyObject_HEAD
    PyObject *receiving; /* StateLock */
    PyObject *inbox;     /* deque */
    PyObject *kept;
    PyObject *receive;
    char is_looking;
} Answers;

static PyObject *take_from_socket(Answers *self)
{
    if (self->is_looking)
        return PyObject_CallMethod((PyObject *)self, "take_past", NULL);
    self->is_looking = 1;
    PyObject *received = take_kept(self->kept, self->receive);
    self->is_looking = 0;
    if (received == NULL && PyErr_ExceptionMatches(PyExc_EOFError)) { /* closed by another thread */
        PyErr_Clear();
        Py_RETURN_NONE;
    }
    return received;
}

static PyObject *take_locked(PyObject *op, bool inbox_first)
{
    Answers *self = (Answers *)op;
    if (self->receiving == NULL || !PyObject_TypeCheck(self->receiving, StateLock_Type) || self->inbox == NULL ||
        self->kept == NULL || !PyObject_TypeCheck(self->kept, KeptBlocks_Type) || self->receive == NULL) {
        PyErr_SetString(PyExc_RuntimeError, "this object is not complete");
        return NULL;
    }
    StateLock *lock = (StateLock *)self->receiving;
    if (lock_acquire(lock) < 0)
        return NULL;
    Py_ssize_t waiting = inbox_first ? PyObject_Size(self->inbox) : 0;
    PyObject *received = waiting < 0 ? NULL
                         : waiting   ? PyObject_CallMethod(self->inbox, "popleft", NULL)
                                     : take_from_socket(self);
    lock_release(lock);
    return received;
}

static PyObject *take_answer(PyObject *op, PyObject *unused)
{
    (void)unused;
    return take_locked(op, true);
}

static PyObject *take_answer_from_socket(PyObject *op, PyObject *unused)
{
    (void)unused;
    return take_locked(op, false);
}

#define ANSWERS_FIELDS(_) _(receiving) _(inbox) _(kept) _(receive)
DEFINE_GC(answers, Answers, ANSWERS_FIELDS)

static PyMethodDef answers_methods[] = {
    {"take", take_answer, METH_NOARGS, NULL},
    {"take_from_socket", take_answer_from_socket, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef answers_members[] = {
    {"receiving", T_OBJECT, offsetof(Answers, receiving), 0, NULL},
    {"inbox", T_OBJECT, offsetof(Answers, inbox), 0, NULL},
    {"kept", T_OBJECT, offsetof(Answers, kept), 0, NULL},
    {"receive", T_OBJECT, offsetof(Answers, receive), 0, NULL},
    {"is_looking", T_BOOL, offsetof(Answers, is_looking), 0, NULL},
    {NULL, 0, 0, 0, NULL},
};

DEFINE_BASE(answers, Answers, "AnswerFields")

/* --- a worker's questions --- */

/* queues.worker.WorkerSide derives from this. */
typedef struct {
    PyObject_HEAD
    PyObject *taking;  /* StateLock */
    PyObject *receive;
    PyObject *known;   /* set of threads */
    PyObject *busy;    /* set of threads */
    PyObject *closed;  /* str */
    PyObject *room;    /* None, or whom to tell of each question taken */
    uint64_t address;  /* of the words of this handle's slot: the number, and the state; 0 once they are gone */
    long long state;
    long long written;
} Taker;

#define BUSY ((long long)1 << 24) /* counters.BUSY */

static void note(Taker *self, size_t word, uint64_t value)
{
    atomic_store_explicit((_Atomic uint64_t *)(uintptr_t)self->address + word, value, memory_order_release);
}

static bool is_open(const Taker *self)
{
    return self->closed != NULL && PyUnicode_Check(self->closed) && PyUnicode_GetLength(self->closed) == 0;
}

/* Notes a question that was just received, with the lock held. */
static int note_question(Taker *self, PyObject *received)
{
    char *bytes;
    Py_ssize_t size;
    if (!PyTuple_Check(received) || PyBytes_AsStringAndSize(PyTuple_GetItem(received, 0), &bytes, &size) < 0)
        return -1;
    if (size < TRAILER) {
        PyErr_SetString(PyExc_ValueError, "this message has no number");
        return -1;
    }
    uint64_t number;
    memcpy(&number, bytes + size - TRAILER, sizeof number);
    PyObject *thread = PyLong_FromUnsignedLong(PyThread_get_thread_ident());
    if (thread == NULL)
        return -1;
    int found = PySet_Contains(self->known, thread);
    if (!found) {
        PyObject *met = PyObject_CallMethod((PyObject *)self, "meet", "(O)", thread);
        Py_XDECREF(met);
        found = met == NULL ? -1 : 1;
    }
    if (found > 0 && is_open(self)) {
        if (self->address && *(uint64_t *)(uintptr_t)self->address < number)
            note(self, 0, number);
        found = PySet_Contains(self->busy, thread);
        if (!found)
            found = PySet_Add(self->busy, thread) < 0 ? -1 : 0;
        if (found >= 0)
            self->state += BUSY + !found;
        if (found >= 0 && self->address)
            note(self, 1, (uint64_t)self->state);
        if (found >= 0 && self->address && self->room != NULL && self->room != Py_None) {
            PyObject *made = PyObject_CallMethod(self->room, "made", NULL);
            Py_XDECREF(made);
            found = made == NULL ? -1 : found;
        }
    }
    Py_DECREF(thread);
    return found < 0 ? -1 : 0;
}

static bool is_complete(Taker *self)
{
    if (self->taking != NULL && PyObject_TypeCheck(self->taking, StateLock_Type) && self->receive != NULL &&
        self->known != NULL && PySet_Check(self->known) && self->busy != NULL && PySet_Check(self->busy))
        return true;
    PyErr_SetString(PyExc_RuntimeError, "this object is not complete");
    return false;
}

static PyObject *take_question(PyObject *op, PyObject *unused)
{
    (void)unused;
    Taker *self = (Taker *)op;
    if (!is_complete(self) || lock_acquire((StateLock *)self->taking) < 0)
        return NULL;
    PyObject *received = receive_by(self->receive);
    if (received == NULL && PyErr_ExceptionMatches(PyExc_EOFError)) {
        PyErr_Clear();
        received = PyObject_CallMethod(op, "owner_gone", NULL);
    } else if (received != NULL && received != Py_None && note_question(self, received) < 0)
        Py_CLEAR(received);
    lock_release((StateLock *)self->taking);
    return received;
}

/* The thread is not busy any more. */
static PyObject *idle(PyObject *op, PyObject *thread)
{
    Taker *self = (Taker *)op;
    if (!is_complete(self) || lock_acquire((StateLock *)self->taking) < 0)
        return NULL;
    int found = PySet_Discard(self->busy, thread);
    if (found > 0) {
        self->state--;
        if (is_open(self) && self->address)
            note(self, 1, (uint64_t)self->state);
    }
    lock_release((StateLock *)self->taking);
    if (found < 0)
        return NULL;
    Py_RETURN_NONE;
}

/* answered(thread, data): an answer of this thread has left. */
static PyObject *answered(PyObject *op, PyObject *const *args, Py_ssize_t count)
{
    if (count != 2) {
        PyErr_SetString(PyExc_TypeError, "answered() takes the thread and the data");
        return NULL;
    }
    ((Taker *)op)->written++;
    return idle(op, args[0]);
}

#define TAKER_FIELDS(_) _(taking) _(receive) _(known) _(busy) _(closed) _(room)
DEFINE_GC(taker, Taker, TAKER_FIELDS)

static PyMethodDef taker_methods[] = {
    {"take", take_question, METH_NOARGS, NULL},
    {"idle", idle, METH_O, NULL},
    {"answered", (PyCFunction)(void (*)(void))answered, METH_FASTCALL, NULL},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef taker_members[] = {
    {"taking", T_OBJECT, offsetof(Taker, taking), 0, NULL},
    {"receive", T_OBJECT, offsetof(Taker, receive), 0, NULL},
    {"known", T_OBJECT, offsetof(Taker, known), 0, NULL},
    {"busy", T_OBJECT, offsetof(Taker, busy), 0, NULL},
    {"closed", T_OBJECT, offsetof(Taker, closed), 0, NULL},
    {"room", T_OBJECT, offsetof(Taker, room), 0, NULL},
    {"address", T_ULONGLONG, offsetof(Taker, address), 0, NULL},
    {"state", T_LONGLONG, offsetof(Taker, state), 0, NULL},
    {"written", T_LONGLONG, offsetof(Taker, written), 0, NULL},
    {NULL, 0, 0, 0, NULL},
};

DEFINE_BASE(taker, Taker, "TakerFields")

/* --- the questions that were sent --- */

/* queues.history.History derives from this. */
typedef struct {
    PyObject_HEAD
    PyObject *append; /* append(bytes) */
    PyObject *keep;   /* keep() */
    PyObject *count;  /* count(), or None */
    long long last;   /* number */
    long long keep_every;
    Py_ssize_t largest; /* bytes */
} History;

static PyObject *no_bytes;

/* note_sent(number, data) */
static PyObject *note_sent(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    History *self = (History *)op;
    if (nargs != 2 || !PyBytes_Check(args[1]) || self->append == NULL || self->keep == NULL || self->keep_every < 1) {
        PyErr_SetString(PyExc_TypeError, "note_sent() takes a number and the data, of an object that is complete");
        return NULL;
    }
    long long number = PyLong_AsLongLong(args[0]);
    if (number == -1 && PyErr_Occurred())
        return NULL;
    self->last = number;
    PyObject *count_one = self->count;
    if (count_one != NULL && count_one != Py_None) {
        Py_INCREF(count_one);
        PyObject *counted = PyObject_CallFunctionObjArgs(count_one, NULL);
        Py_DECREF(count_one);
        if (counted == NULL)
            return NULL;
        Py_DECREF(counted);
    }
    PyObject *data = PyBytes_Size(args[1]) <= self->largest ? args[1] : no_bytes;
    PyObject *result = PyObject_CallFunctionObjArgs(self->append, data, NULL);
    if (result != NULL && number % self->keep_every == 0) {
        Py_DECREF(result);
        result = PyObject_CallFunctionObjArgs(self->keep, NULL);
    }
    return result;
}

#define HISTORY_FIELDS(_) _(append) _(keep) _(count)
DEFINE_GC(history, History, HISTORY_FIELDS)

static PyMethodDef history_methods[] = {
    {"note_sent", (PyCFunction)(void (*)(void))note_sent, METH_FASTCALL, NULL},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef history_members[] = {
    {"append", T_OBJECT, offsetof(History, append), 0, NULL},
    {"keep", T_OBJECT, offsetof(History, keep), 0, NULL},
    {"count", T_OBJECT, offsetof(History, count), 0, NULL},
    {"last", T_LONGLONG, offsetof(History, last), 0, NULL},
    {"keep_every", T_LONGLONG, offsetof(History, keep_every), 0, NULL},
    {"largest", T_PYSSIZET, offsetof(History, largest), 0, NULL},
    {NULL, 0, 0, 0, NULL},
};

DEFINE_BASE(history, History, "HistoryFields")

int add_receive(PyObject *module)
{
    no_bytes = PyBytes_FromStringAndSize(NULL, 0);
    KeptBlocks_Type = add_type(module, &kept_spec);
    if (no_bytes == NULL || KeptBlocks_Type == NULL || add_type(module, &answers_spec) == NULL ||
        add_type(module, &taker_spec) == NULL || add_type(module, &history_spec) == NULL)
        return -1;
    return 0;
}
