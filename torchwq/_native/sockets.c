/* Sends and receives whole messages on a seqpacket socket, and spins for one. Its twin: transport/seqpacket.py.
 *
 * Sending and receiving never wait, so they keep the GIL: between the look at `fd` and the system call no other thread
 * can close it, and a signal handler runs before or after, never in the middle. `spin` and `sleep` release the GIL. They
 * only look.
 *
 * Sources: unix(7), recv(2), cmsg(3).
 */

#include "core.h"

#include <errno.h>
#include <limits.h>
#include <poll.h>
#include <sched.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define MAX_FDS 253             /* endpoint.MAX_FDS */

/* transport.seqpacket.SeqpacketEndpoint derives from this. */
typedef struct {
    PyObject_HEAD
    int fd; /* -1 once it is closed */
} SeqpacketCalls;

/* What `set_sockets` has set. */
static PyObject *no_fds;   /* the descriptors of a message without any: an empty list, which nobody changes */
static PyObject *on_error; /* on_error(errno, closed): returns if the socket is full; else raises */
static PyObject *on_fds;   /* on_fds(fds, truncated): the list for descriptors that are not as most are; or raises */

double monotonic(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

static int64_t monotonic_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

static PyTypeObject *SeqpacketCalls_Type;

bool is_seqpacket(PyObject *endpoint)
{
    return endpoint != NULL && PyObject_TypeCheck(endpoint, SeqpacketCalls_Type);
}

/* Sends the data and the descriptors. Returns 0; the error's number; or -1 with an exception. */
static int send_message(int socket, PyObject *data, PyObject *fds)
{
    struct iovec part;
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
    _Alignas(struct cmsghdr) char control[CMSG_SPACE(MAX_FDS * sizeof(int))];
    char *bytes;
    Py_ssize_t size;
    if (PyBytes_AsStringAndSize(data, &bytes, &size) < 0)
        return -1;
    part.iov_base = bytes, part.iov_len = (size_t)size;
    Py_ssize_t num_fds = fds == NULL ? 0 : PySequence_Size(fds);
    if (num_fds < 0)
        return -1;
    if (num_fds > MAX_FDS) {
        PyErr_Format(PyExc_ValueError, "%zd descriptors are too many for one message", num_fds);
        return -1;
    }
    if (num_fds) {
        memset(control, 0, CMSG_SPACE((size_t)num_fds * sizeof(int)));
        message.msg_control = control;
        message.msg_controllen = CMSG_SPACE((size_t)num_fds * sizeof(int));
        struct cmsghdr *header = CMSG_FIRSTHDR(&message);
        header->cmsg_level = SOL_SOCKET;
        header->cmsg_type = SCM_RIGHTS;
        header->cmsg_len = CMSG_LEN((size_t)num_fds * sizeof(int));
        for (Py_ssize_t index = 0; index < num_fds; index++) {
            PyObject *item = PySequence_GetItem(fds, index);
            if (item == NULL)
                return -1;
            long fd = PyLong_AsLong(item);
            Py_DECREF(item);
            if (fd == -1 && PyErr_Occurred())
                return -1;
            int value = (int)fd;
            memcpy(CMSG_DATA(header) + (size_t)index * sizeof(int), &value, sizeof(int));
        }
    }
    ssize_t sent;
    do
        sent = num_fds ? sendmsg(socket, &message, MSG_DONTWAIT | MSG_NOSIGNAL)
                       : send(socket, bytes, (size_t)size, MSG_DONTWAIT | MSG_NOSIGNAL); /* costs less */
    while (sent < 0 && errno == EINTR);
    return sent < 0 ? errno : 0;
}

int seqpacket_send(PyObject *endpoint, PyObject *data, PyObject *fds)
{
    int error = send_message(((SeqpacketCalls *)endpoint)->fd, data, fds);
    return error < 0 ? -1 : !error;
}

/* try_send(data: bytes, fds: sequence of int = ()): whether the socket had room. */
static PyObject *try_send(PyObject *op, PyObject *const *args, Py_ssize_t count)
{
    SeqpacketCalls *self = (SeqpacketCalls *)op;
    if (count < 1 || count > 2 || on_error == NULL) {
        PyErr_SetString(PyExc_TypeError, "try_send() takes the data and the descriptors");
        return NULL;
    }
    int error = send_message(self->fd, args[0], count == 2 ? args[1] : NULL);
    if (error < 0)
        return NULL;
    if (!error)
        Py_RETURN_TRUE;
    if (error == EAGAIN || error == EWOULDBLOCK)
        Py_RETURN_FALSE;
    PyObject *result = PyObject_CallFunction(on_error, "iO", error, self->fd < 0 ? Py_True : Py_False);
    if (result == NULL)
        return NULL;
    Py_DECREF(result);
    Py_RETURN_FALSE;
}

static void close_all(const int *fds, size_t count)
{
    for (size_t index = 0; index < count; index++)
        close(fds[index]);
}

static PyObject *list_of(const int *fds, size_t count)
{
    PyObject *list = PyList_New((Py_ssize_t)count);
    for (size_t index = 0; list != NULL && index < count; index++) {
        PyObject *fd = PyLong_FromLong(fds[index]);
        if (fd == NULL || PyList_SetItem(list, (Py_ssize_t)index, fd) < 0)
            Py_CLEAR(list);
    }
    if (list == NULL)
        close_all(fds, count);
    return list;
}

/* The descriptors of a message, as a list. */
static PyObject *received_fds(struct msghdr *message)
{
    int fds[MAX_FDS];
    size_t count = 0;
    bool odd = message->msg_flags & MSG_CTRUNC;
    for (struct cmsghdr *each = CMSG_FIRSTHDR(message); each != NULL; each = CMSG_NXTHDR(message, each)) {
        if (each->cmsg_level != SOL_SOCKET || each->cmsg_type != SCM_RIGHTS)
            continue;
        size_t bytes = each->cmsg_len - CMSG_LEN(0);
        for (size_t at = 0; at + sizeof(int) <= bytes; at += sizeof(int)) {
            int fd;
            memcpy(&fd, CMSG_DATA(each) + at, sizeof fd);
            if (count == MAX_FDS) { /* the kernel sends no more */
                close(fd);
                continue;
            }
            odd |= fd <= 2;
            fds[count++] = fd;
        }
    }
    PyObject *list = list_of(fds, count);
    if (list == NULL || !odd)
        return list;
    PyObject *truncated = message->msg_flags & MSG_CTRUNC ? Py_True : Py_False;
    PyObject *result = PyObject_CallFunctionObjArgs(on_fds, list, truncated, NULL);
    Py_DECREF(list);
    return result;
}

int seqpacket_receive_into(PyObject *op, char *data, Py_ssize_t *length, PyObject **fds)
{
    SeqpacketCalls *self = (SeqpacketCalls *)op;
    if (no_fds == NULL) {
        PyErr_SetString(PyExc_RuntimeError, "set_sockets() has not been called");
        return -1;
    }
    _Alignas(struct cmsghdr) char control[CMSG_SPACE(MAX_FDS * sizeof(int))];
    struct iovec part = {.iov_base = data, .iov_len = MAX_MESSAGE};
    struct msghdr message = {
        .msg_iov = &part,
        .msg_iovlen = 1,
        .msg_control = control,
        .msg_controllen = sizeof control,
    };
    ssize_t size;
    /* ECONNRESET: the peer closed with messages of ours unread. The kernel says so once, on the read that comes next;
     * the messages that the peer had sent before are still there. */
    do
        size = recvmsg(self->fd, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    while (size < 0 && (errno == EINTR || errno == ECONNRESET));
    if (size < 0) {
        if (errno == EAGAIN || errno == EWOULDBLOCK)
            return 0;
        if (errno == EBADF) /* closed by another thread of this process */
            PyErr_SetNone(PyExc_EOFError);
        else
            PyErr_SetFromErrno(PyExc_OSError);
        return -1;
    }
    bool plain = message.msg_controllen == 0 && !(message.msg_flags & MSG_CTRUNC);
    if (plain && size == 0) {
        PyErr_SetNone(PyExc_EOFError);
        return -1;
    }
    *length = size, *fds = no_fds;
    if (plain)
        Py_INCREF(no_fds);
    else
        *fds = received_fds(&message);
    return *fds == NULL ? -1 : 1;
}

PyObject *pack_received(const char *data, Py_ssize_t size, PyObject *fds)
{
    PyObject *bytes = PyBytes_FromStringAndSize(data, size);
    PyObject *result = bytes == NULL ? NULL : PyTuple_New(2);
    if (result == NULL) {
        Py_XDECREF(bytes);
        for (Py_ssize_t index = 0; index < PyList_Size(fds); index++)
            close((int)PyLong_AsLong(PyList_GetItem(fds, index)));
        Py_DECREF(fds);
        return NULL;
    }
    PyTuple_SetItem(result, 0, bytes);
    PyTuple_SetItem(result, 1, fds);
    return result;
}

/* try_receive(): the bytes and the descriptors of the next message; None if there is none now. Raises EOFError. */
PyObject *seqpacket_receive(PyObject *endpoint)
{
    char data[MAX_MESSAGE];
    Py_ssize_t size;
    PyObject *fds;
    int found = seqpacket_receive_into(endpoint, data, &size, &fds);
    if (found < 0)
        return NULL;
    if (!found)
        Py_RETURN_NONE;
    return pack_received(data, size, fds);
}

static PyObject *try_receive(PyObject *self, PyObject *unused)
{
    (void)unused;
    return seqpacket_receive(self);
}

PyObject *seqpacket_of(PyObject *receive)
{
    if (!PyCFunction_Check(receive) || PyCFunction_GetFunction(receive) != try_receive)
        return NULL;
    PyObject *endpoint = PyCFunction_GetSelf(receive);
    return is_seqpacket(endpoint) ? endpoint : NULL;
}

static PyMethodDef socket_methods[] = {
    {"try_send", (PyCFunction)(void (*)(void))try_send, METH_FASTCALL, NULL},
    {"try_receive", try_receive, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef socket_members[] = {
    {"fd", T_INT, offsetof(SeqpacketCalls, fd), 0, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot socket_slots[] = {
    {Py_tp_dealloc, free_object},
    {Py_tp_methods, socket_methods},
    {Py_tp_members, socket_members},
    {0, NULL},
};

static PyType_Spec socket_spec = {
    .name = "torchwq._native._core.SeqpacketCalls",
    .basicsize = sizeof(SeqpacketCalls),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE,
    .slots = socket_slots,
};

static long preemptions(void)
{
    struct rusage usage;
    return getrusage(RUSAGE_THREAD, &usage) == 0 ? usage.ru_nivcsw : 0;
}

/* spin(fd, alarm, ns, polls_per_yield): look for at most `ns` nanoseconds whether one of the two descriptors is
 * readable. Returns 1 if so, 0 if not, and -1 if not and another thread has taken this one's core meanwhile. */
static PyObject *spin(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    (void)module;
    if (count != 4) {
        PyErr_SetString(PyExc_TypeError, "spin() takes two descriptors, the nanoseconds, and the polls per yield");
        return NULL;
    }
    struct pollfd watched[2] = {
        {.fd = (int)PyLong_AsLong(args[0]), .events = POLLIN},
        {.fd = (int)PyLong_AsLong(args[1]), .events = POLLIN},
    };
    long long ns = PyLong_AsLongLong(args[2]);
    long polls = PyLong_AsLong(args[3]);
    if (PyErr_Occurred())
        return NULL;
    int found = 0;
    Py_BEGIN_ALLOW_THREADS
    int64_t until = monotonic_ns() + ns;
    long before = preemptions();
    for (;;) {
        for (long turn = 0; turn < polls && found <= 0; turn++)
            found = poll(watched, 2, 0);
        if (found > 0 || monotonic_ns() > until)
            break;
        sched_yield();
    }
    if (found <= 0)
        found = preemptions() != before ? -1 : 0;
    Py_END_ALLOW_THREADS
    return PyLong_FromLong(found > 0 ? 1 : found);
}

#ifndef EPOLLEXCLUSIVE
#define EPOLLEXCLUSIVE (1u << 28) /* since Linux 4.5; older headers lack it */
#endif

/* After so many intervals of a sleep the main thread looks for signals. A look costs it half as much processor time as an
 * interval does. */
#define SLEEPS_PER_CHECK 4

/* Waits for an event of `epoll` and then looks whether `fd` is readable: the kernel may have woken another process for
 * it, which was killed. False if there may be something to do. */
static bool sleep_quietly(int epoll, int fd, double seconds)
{
    struct epoll_event found[2];
    struct pollfd watched = {.fd = fd, .events = POLLIN};
    return epoll_wait(epoll, found, 2, seconds <= 0 ? 0 : (int)(seconds * 1000 + 0.999)) == 0 && poll(&watched, 1, 0) == 0;
}

/* sleep(epoll, fd, seconds, interval, asleep): sleep until `epoll` has an event, and let it watch `fd` meanwhile, at which
 * this looks each `interval` seconds. So whoever calls this is woken only if there is something to do. The set `asleep`
 * has the threads that sleep here, this one among them; the last one ends the watching. */
static PyObject *sleep_until_event(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    (void)module;
    if (count != 5 || !PyAnySet_Check(args[4])) {
        PyErr_SetString(PyExc_TypeError, "sleep() takes two descriptors, the seconds, the interval, and a set");
        return NULL;
    }
    PyObject *asleep = args[4];
    int epoll = (int)PyLong_AsLong(args[0]), fd = (int)PyLong_AsLong(args[1]);
    double seconds = PyFloat_AsDouble(args[2]), interval = PyFloat_AsDouble(args[3]);
    if (PyErr_Occurred())
        return NULL;
    if (!(interval > 0 && interval < 3600)) {
        PyErr_SetString(PyExc_ValueError, "the interval must be less than an hour");
        return NULL;
    }
    PyObject *me = PyLong_FromUnsignedLong(PyThread_get_thread_ident());
    if (me == NULL)
        return NULL;
    struct epoll_event event = {.events = EPOLLIN | EPOLLEXCLUSIVE, .data.fd = fd};
    /* Another thread watches it already; or it is closed, and the alarm set. Before Linux 4.5, all sleepers wake. */
    if (epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event) < 0 && errno == EINVAL) {
        event.events = EPOLLIN;
        epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event);
    }
    /* A signal wakes nobody that came just before this sleeps, or in another thread, or from `interrupt_main`. Python
     * handles signals in the main thread, which therefore looks for them now and then: that takes the GIL. */
    int in_a_row = syscall(SYS_gettid) == getpid() ? SLEEPS_PER_CHECK : INT_MAX, checked;
    bool quiet;
    do {
        int sleeps = 0;
        Py_BEGIN_ALLOW_THREADS
        do {
            quiet = sleep_quietly(epoll, fd, seconds < interval ? seconds : interval);
            seconds -= interval;
        } while (quiet && seconds > 0 && ++sleeps < in_a_row);
        Py_END_ALLOW_THREADS
        checked = PyErr_CheckSignals();
    } while (!checked && quiet && seconds > 0 && PySet_Contains(asleep, me) == 1); /* a handler may have slept here, too */
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    /* This thread leaves the set, and looks at it, in one step. */
    int left = PySet_Discard(asleep, me);
    Py_DECREF(me);
    if (PySet_Size(asleep) == 0)
        epoll_ctl(epoll, EPOLL_CTL_DEL, fd, &event);
    if (checked < 0)
        PyErr_Restore(type, value, traceback);
    if (checked < 0 || left < 0)
        return NULL;
    Py_RETURN_NONE;
}

/* set_sockets(no_fds, on_error, on_fds) */
static PyObject *set_sockets(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    (void)module;
    if (count != 3 || !PyList_Check(args[0])) {
        PyErr_SetString(PyExc_TypeError, "set_sockets() takes a list and two functions");
        return NULL;
    }
    Py_INCREF(args[0]), Py_INCREF(args[1]), Py_INCREF(args[2]); /* for as long as the process lives */
    no_fds = args[0], on_error = args[1], on_fds = args[2];
    Py_RETURN_NONE;
}

static PyMethodDef functions[] = {
    {"set_sockets", (PyCFunction)(void (*)(void))set_sockets, METH_FASTCALL, NULL},
    {"sleep", (PyCFunction)(void (*)(void))sleep_until_event, METH_FASTCALL, NULL},
    {"spin", (PyCFunction)(void (*)(void))spin, METH_FASTCALL, NULL},
    {NULL, NULL, 0, NULL},
};

int add_sockets(PyObject *module)
{
    SeqpacketCalls_Type = add_type(module, &socket_spec);
    return SeqpacketCalls_Type == NULL ? -1 : add_functions(module, functions);
}
