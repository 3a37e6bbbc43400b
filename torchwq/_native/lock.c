/* A reentrant lock that C code takes without a call: its twin is threading.RLock.
 *
 * Invariant: `inner` is held while `owner` is not 0, and only the owner changes `owner` and `count`. Both change with the
 * GIL held, so that a test and the change that follows it are one step. A thread that has waited gets `inner` without the
 * GIL: until it has the GIL again, `inner` is held and `owner` is 0.
 */

#include "core.h"

#define MAX_SECONDS 1e9 /* CPython ends the process if a lock is to wait for longer than 2**63 ns */

PyTypeObject *StateLock_Type;

static bool try_lock(StateLock *self, unsigned long me)
{
    if (self->owner == me) {
        self->count++;
        return true;
    }
    if (self->owner == 0 && PyThread_acquire_lock(self->inner, NOWAIT_LOCK)) {
        self->owner = me;
        self->count = 1;
        return true;
    }
    return false;
}

/* Waits at most `microseconds`; for ever if they are negative. Returns 1, 0 after that time, or -1 with an exception. */
static int acquire(StateLock *self, long long microseconds)
{
    unsigned long me = PyThread_get_thread_ident();
    if (try_lock(self, me))
        return 1;
    double end = monotonic() + (double)microseconds / 1e6;
    for (;;) {
        PyLockStatus status;
        Py_BEGIN_ALLOW_THREADS
        status = PyThread_acquire_lock_timed(self->inner, microseconds, 1);
        Py_END_ALLOW_THREADS
        if (status == PY_LOCK_ACQUIRED) {
            self->owner = me;
            self->count = 1;
            return 1;
        }
        if (status == PY_LOCK_FAILURE)
            return 0;
        if (PyErr_CheckSignals() < 0)
            return -1;
        if (try_lock(self, me)) /* the signal handler may have used it, and the thread is the same */
            return 1;
        if (microseconds >= 0) {
            double left = end - monotonic();
            if (left <= 0)
                return 0;
            microseconds = (long long)(left * 1e6);
        }
    }
}

int lock_acquire(StateLock *self)
{
    return acquire(self, -1) < 0 ? -1 : 0;
}

void lock_release(StateLock *self)
{
    if (self->owner != PyThread_get_thread_ident())
        return; /* the child of a fork, which has a new lock, comes back into a call that has taken the old one */
    if (--self->count == 0) {
        self->owner = 0;
        PyThread_release_lock(self->inner);
    }
}

static PyObject *lock_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    if (PyTuple_Size(args) || (kwargs != NULL && PyDict_Size(kwargs))) {
        PyErr_SetString(PyExc_TypeError, "StateLock() takes no arguments");
        return NULL;
    }
    allocfunc allocate = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    StateLock *self = (StateLock *)allocate(type, 0);
    if (self == NULL)
        return NULL;
    self->inner = PyThread_allocate_lock();
    if (self->inner == NULL) {
        Py_DECREF(self);
        return PyErr_NoMemory();
    }
    return (PyObject *)self;
}

static void lock_dealloc(PyObject *op)
{
    StateLock *self = (StateLock *)op;
    if (self->inner != NULL) {
        if (self->owner)
            PyThread_release_lock(self->inner);
        PyThread_free_lock(self->inner);
    }
    free_object(op);
}

static PyObject *lock_enter(PyObject *self, PyObject *unused)
{
    (void)unused;
    if (lock_acquire((StateLock *)self) < 0)
        return NULL;
    Py_RETURN_TRUE;
}

static PyObject *lock_acquire_method(PyObject *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"blocking", "timeout", NULL};
    int blocking = 1;
    double timeout = -1;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|pd:acquire", names, &blocking, &timeout))
        return NULL;
    if (!(timeout < MAX_SECONDS)) {
        PyErr_SetString(PyExc_OverflowError, "timeout value is too large");
        return NULL;
    }
    int found = acquire((StateLock *)self, !blocking ? 0 : timeout < 0 ? -1 : (long long)(timeout * 1e6));
    return found < 0 ? NULL : PyBool_FromLong(found);
}

static PyObject *lock_release_method(PyObject *op, PyObject *unused)
{
    (void)unused;
    StateLock *self = (StateLock *)op;
    if (self->owner != PyThread_get_thread_ident()) {
        PyErr_SetString(PyExc_RuntimeError, "this thread does not hold the lock");
        return NULL;
    }
    lock_release(self);
    Py_RETURN_NONE;
}

static PyObject *lock_exit(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    (void)args, (void)count;
    return lock_release_method(self, NULL);
}

static PyObject *lock_is_owned(PyObject *self, PyObject *unused)
{
    (void)unused;
    return PyBool_FromLong(((StateLock *)self)->owner == PyThread_get_thread_ident());
}

static PyMethodDef methods[] = {
    {"__enter__", lock_enter, METH_NOARGS, NULL},
    {"__exit__", (PyCFunction)(void (*)(void))lock_exit, METH_FASTCALL, NULL},
    {"acquire", (PyCFunction)(void (*)(void))lock_acquire_method, METH_VARARGS | METH_KEYWORDS, NULL},
    {"release", lock_release_method, METH_NOARGS, NULL},
    {"_is_owned", lock_is_owned, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_new, lock_new},
    {Py_tp_dealloc, lock_dealloc},
    {Py_tp_methods, methods},
    {0, NULL},
};

static PyType_Spec spec = {
    .name = "torchwq._native._core.StateLock",
    .basicsize = sizeof(StateLock),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = slots,
};

int add_lock(PyObject *module)
{
    StateLock_Type = add_type(module, &spec);
    return StateLock_Type == NULL ? -1 : 0;
}
