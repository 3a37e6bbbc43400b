/* What the files of the native part share: the limited API, and the types that other files look into.
 *
 * The page on the native part (docs/internals/native.md) says what this room is for, and its protocols.
 */
#ifndef TORCHWQ_CORE_H
#define TORCHWQ_CORE_H

#define Py_LIMITED_API 0x030A0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <structmember.h>

#include <stdbool.h>
#include <stdint.h>

/* Numbers are copied into messages and out of them as they are in memory, and shared words hold addresses and counts. */
#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__ || UINTPTR_MAX < UINT64_MAX
#error "the native part is made for little-endian machines with 64 bits"
#endif

/* What every function returns that finds that its twin, which knows more, has to do the work. Not an error. */
#define NOT_MINE 1

/* --- messages, as marshalling.wire and transport.trailer have them --- */

#define BARE '.'          /* the last byte of a pickle without a trailer */
#define PICKLE 0          /* wire.Pickle */
#define REFERENCES 1      /* wire.References */
#define TRAILER 9         /* bytes: the number, and the kind */
#define REFERENCE_SIZE 16 /* bytes: the number and the bytes of a block */
#define COUNT_SIZE 4      /* bytes: the number of references */
#define PACKED (1u << 31) /* flag in that number: some tensors are slices of the last block */

/* --- lock.c --- */

typedef struct {
    PyObject_HEAD
    PyThread_type_lock inner; /* held while `owner` is not 0 */
    unsigned long owner;
    unsigned long count;
} StateLock;

extern PyTypeObject *StateLock_Type;
int lock_acquire(StateLock *self); /* -1 with an exception if the wait was interrupted */
void lock_release(StateLock *self);

/* --- counts.c --- */

enum { STATE_FREE, STATE_IN_USE, STATE_ESCAPED, STATE_IN_FLIGHT };

typedef struct {
    PyObject_HEAD
    uint64_t *words;
    Py_ssize_t length; /* of `words`, in words */
    uint64_t first;    /* index of this process's words for row 0 */
    PyObject *is_alive;
} Counts;

extern PyTypeObject *Counts_Type;
bool counts_is_current(const Counts *self, uint64_t number);
void counts_sent(Counts *self, uint64_t number);
void counts_received(Counts *self, uint64_t number, uint64_t flags);
void counts_clear_flag(Counts *self, uint64_t number, uint64_t flag);
int counts_state(Counts *self, uint64_t number); /* -1 with an exception */

#define UNTRACKED UINT64_MAX

/* --- sockets.c --- */

#define MAX_MESSAGE (32 * 1024) /* seqpacket.MAX_MESSAGE */

bool is_seqpacket(PyObject *endpoint);                                  /* whether this file can use it */
int seqpacket_send(PyObject *endpoint, PyObject *data, PyObject *fds);  /* 1; 0 if it was not sent; -1: no such arguments */
PyObject *seqpacket_receive(PyObject *endpoint);                        /* as `try_receive` */
/* The same, into the MAX_MESSAGE bytes at `data`, and a new reference to the descriptors: 1, 0 if there is no message, or
 * -1 with an exception. And what `seqpacket_receive` makes of them, of which it takes over the descriptors. */
int seqpacket_receive_into(PyObject *endpoint, char *data, Py_ssize_t *size, PyObject **fds);
PyObject *pack_received(const char *data, Py_ssize_t size, PyObject *fds);
PyObject *seqpacket_of(PyObject *receive);                              /* borrowed: the endpoint whose `try_receive` this is; or NULL */

/* --- block.c --- */

enum { MADE, MAPPED, ADOPTED, PLAIN };

#define MAX_PROTOTYPES 4

typedef struct {
    PyObject *geometry; /* the tuple of the twin */
    PyObject *tensor;
} Prototype;

/* The fields of memory.block.Block that the hot path needs. */
typedef struct {
    PyObject_HEAD
    int kind;
    int fd;
    int users;
    char is_polled;
    char is_listed_idle;
    char is_orphaned;
    char has_content;
    uint64_t number;
    uint64_t nbytes;
    uint64_t address;
    double used_at;
    double expires_at;
    PyObject *storage;          /* NULL or None while the block does not keep one */
    PyObject *cdata;            /* the storage's _cdata, an int */
    PyObject *slice_prototypes; /* NULL or None, or what the twin keeps there */
    PyObject *left_memory;      /* what a tensor that moved here has left, until the block is used again */
    Prototype prototypes[MAX_PROTOTYPES];
    int num_prototypes;
} Block;

extern PyTypeObject *Block_Type; /* the base class: see `BlockFields` */
bool is_block(PyObject *object);  /* else a TypeError is set */
int block_in_use(Block *self);   /* -1 with an exception */
PyObject *block_prototype(Block *self, PyObject *geometry); /* borrowed; NULL without an exception if there is none */

double monotonic(void);
long reference_count(PyObject *object);

/* --- torch.c --- */

#define MAX_DIMS 16

/* A plain dense tensor on the CPU, as torch has shown it. */
typedef struct {
    uint64_t address;
    int code;     /* of its dtype: an index into memory.storages.DTYPES */
    int itemsize; /* bytes */
    int ndim;
    int64_t sizes[MAX_DIMS];
    int64_t strides[MAX_DIMS];
} View;

extern bool torch_ready;
bool torch_is_tensor(PyObject *obj);            /* exactly torch.Tensor */
bool torch_is_class(PyObject *cls);             /* torch.Tensor itself */
int torch_look(PyObject *tensor, View *view);   /* 0; NOT_MINE if it is not plain. The address is current */
int torch_look_again(PyObject *tensor, int code, View *view); /* the same, quicker, where its dtype is likely that one */
bool torch_is_at(PyObject *tensor, uint64_t address); /* runs nothing else; false of a tensor that torch cannot show */
uint64_t view_span(const View *view);           /* bytes from the first element to the last; 0 if there is none */
PyObject *torch_detach(PyObject *tensor);       /* new reference */
long call_for_number(PyObject *function, PyObject *argument); /* -1 with an exception */
long torch_use_count(PyObject *cdata);          /* -1 with an exception */

/* --- poller.c --- */

typedef struct UsePoller UsePoller;

extern PyTypeObject *UsePoller_Type;
int poller_add(UsePoller *self, Block *block);             /* -1 with an exception */
int poller_poll(UsePoller *self, Py_ssize_t new_tensors);  /* -1 with an exception */

/* --- memory.c --- */

/* The state of the memory room that C code needs, as `set_memory` and its like have set it. */
typedef struct {
    StateLock *lock;
    Counts *counts;      /* NULL while this process has no reference table */
    UsePoller *poller;
    PyObject *finalized; /* the deque of what was finalized since `drain` was called last */
    PyObject *drain;
    PyObject *addresses; /* made and mapped blocks by the addresses of their storages */
    uint64_t hits;
} Memory;

extern Memory memory;
bool memory_ready(void);                               /* whether all of it is there */
int memory_lock(Py_ssize_t new_tensors); /* takes the lock and drains; polls if they are positive. -1 with an exception */
void memory_unlock(void);
Block *memory_block(uint64_t number, uint64_t nbytes); /* borrowed: a made or mapped one; NULL if there is none */
Block *memory_block_at(uint64_t address);              /* the same by address */

/* --- move.c --- */

int move_tensor(PyObject *tensor, const View *view, PyObject *geometry, Block **block); /* 0, NOT_MINE, or -1 */
Block *pool_take_free(uint64_t nbytes, PyObject **storage);

/* --- outbox.c --- */

bool outbox_is_idle(PyObject *outbox); /* whether nothing waits there, and no thread sends */

/* --- message.c --- */

/* memory.message.Message derives from this. */
typedef struct {
    PyObject_HEAD
    PyObject *data;        /* bytes */
    PyObject *fds;         /* sequence of int */
    PyObject *keep;        /* the owners of `fds` */
    PyObject *numbers;     /* sequence of int: those of its blocks */
    PyObject *counts_sent; /* sequence of functions */
    uint64_t nbytes;
    int kind;
    char only_blocks;
} Message;

Message *as_message(PyObject *payload); /* NULL if it is something else, or not complete */
PyObject *message_new(PyObject *data, PyObject *fds, PyObject *keep, PyObject *numbers, uint64_t nbytes);

/* --- builtin.c --- */

PyObject *builtin_dumps(PyObject *obj, Py_ssize_t limit);         /* None if it is not of built-in types, or too large */
PyObject *builtin_loads(const char *data, Py_ssize_t size);       /* NULL without an exception if it is pickle's */

/* --- module --- */

int add_lock(PyObject *module);
int add_sockets(PyObject *module);
int add_counts(PyObject *module);
int add_block(PyObject *module);
int add_torch(PyObject *module);
int add_poller(PyObject *module);
int add_memory(PyObject *module);
int add_message(PyObject *module);
int add_move(PyObject *module);
int add_outbox(PyObject *module);
int add_receive(PyObject *module);
int add_plain(PyObject *module);
int add_channel(PyObject *module);
int add_collate(PyObject *module);
int add_functions(PyObject *module, PyMethodDef *methods);
PyTypeObject *add_type(PyObject *module, PyType_Spec *spec);

/* Deallocates an object of a heap type whose fields are gone. */
void free_object(PyObject *self);

/* DEFINE_GC(name, Type, FIELDS) defines name_traverse, name_clear and name_dealloc of a heap type whose only references
 * are in its fields: FIELDS(_) is _(field) for each of them. */
#define VISIT_FIELD(field) Py_VISIT(self->field);
#define CLEAR_FIELD(field) Py_CLEAR(self->field);
#define DEFINE_GC(name, Type, FIELDS) \
    static int name##_traverse(PyObject *op, visitproc visit, void *arg) \
    { \
        Type *self = (Type *)op; \
        Py_VISIT(Py_TYPE(op)); \
        FIELDS(VISIT_FIELD) \
        return 0; \
    } \
    static int name##_clear(PyObject *op) \
    { \
        Type *self = (Type *)op; \
        FIELDS(CLEAR_FIELD) \
        return 0; \
    } \
    static void name##_dealloc(PyObject *op) \
    { \
        PyObject_GC_UnTrack(op); \
        name##_clear(op); \
        free_object(op); \
    }

/* DEFINE_BASE(prefix, Type, PythonName) defines prefix_spec: a class that Python classes derive from, with prefix_methods,
 * prefix_members, and what DEFINE_GC has defined. */
#define DEFINE_BASE(prefix, Type, PythonName) \
    static PyType_Slot prefix##_slots[] = { \
        {Py_tp_dealloc, prefix##_dealloc}, \
        {Py_tp_traverse, prefix##_traverse}, \
        {Py_tp_clear, prefix##_clear}, \
        {Py_tp_methods, prefix##_methods}, \
        {Py_tp_members, prefix##_members}, \
        {0, NULL}, \
    }; \
    static PyType_Spec prefix##_spec = { \
        .name = "torchwq._native._core." PythonName, \
        .basicsize = sizeof(Type), \
        .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_BASETYPE, \
        .slots = prefix##_slots, \
    };

#endif
