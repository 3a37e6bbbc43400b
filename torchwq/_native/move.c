/* Moves a small tensor, which alone owns its private memory, into a free block of the pool when it is first written.
 * Its twin: memory/sharing.py and memory/pool.py, whose invariants hold here. What is not simple is left to it.
 */

#include "core.h"

#include <string.h>

#define PAGE 4096u
#define MAX_BYTES (64 * 1024)   /* sharing._SMALL */
#define COARSE_FROM (64 * 1024) /* pool._COARSE_FROM */
#define MAX_CHECKS 4            /* pool._MAX_CHECKS */
#define SOLE_OWNERS 2           /* the tensor, and the Python object of the storage */

/* Functions of torch. */
static PyObject *untyped_storage, *is_shared, *num_bytes, *data_pointer, *is_inference, *tensor_use_count;
static PyObject *cdata_property, *data_property;
static descrgetfunc get_cdata;
static descrsetfunc set_data;
/* Of the twin: the storages that are just being moved; the rings of the pool; whether a block may be used again. */
static PyObject *moving, *rings, *is_free_slow;
static PyObject *popleft_name, *append_name;
/* How many references the Python object of a storage has that nobody else knows. */
static long sole_references = -1;

static int pointer_of(PyObject *storage, uint64_t *address)
{
    PyObject *result = PyObject_CallFunctionObjArgs(data_pointer, storage, NULL);
    if (result == NULL)
        return -1;
    *address = PyLong_AsUnsignedLongLong(result);
    Py_DECREF(result);
    return PyErr_Occurred() ? -1 : 0;
}

/* Whether the storage belongs to this tensor alone, is private, and has no attributes: 1, 0, or -1 with an exception.
 *
 * Another thread may have moved the tensor since it was looked at. So the memory at `view` is believed only if it is
 * that of the storage, to which the caller has a reference. */
static int is_simple(PyObject *tensor, PyObject *storage, const View *view, uint64_t nbytes)
{
    uint64_t address;
    PyObject *attributes = PyObject_GenericGetDict(storage, NULL);
    if (attributes == NULL) {
        PyErr_Clear();
        return 0;
    }
    Py_ssize_t known = PyDict_Size(attributes);
    Py_DECREF(attributes);
    if (known || reference_count(storage) != sole_references)
        return 0;
    long size = call_for_number(num_bytes, storage);
    if (size < 0 || (uint64_t)size != nbytes)
        return PyErr_Occurred() ? -1 : 0;
    if (pointer_of(storage, &address) < 0)
        return -1;
    if (address != view->address)
        return 0;
    PyObject *cdata = get_cdata(cdata_property, storage, (PyObject *)Py_TYPE(storage));
    if (cdata == NULL)
        return -1;
    long owners = torch_use_count(cdata);
    Py_DECREF(cdata);
    if (owners < 0 || owners > SOLE_OWNERS)
        return owners < 0 ? -1 : 0;
    long shared = call_for_number(is_shared, storage);
    if (shared)
        return shared < 0 ? -1 : 0;
    long inference = call_for_number(is_inference, tensor);
    return inference < 0 ? -1 : !inference;
}

/* Whether a made block may be used again: 1, 0, or -1 with an exception. May retire it. */
static int is_free(Block *block)
{
    int used = block_in_use(block);
    if (used)
        return used < 0 ? -1 : 0;
    if (block->number == UNTRACKED)
        return 1;
    int state = memory.counts == NULL ? STATE_IN_USE : counts_state(memory.counts, block->number);
    if (state == STATE_FREE) {
        block->expires_at = 0;
        return 1;
    }
    if (state == STATE_IN_USE || state < 0)
        return state < 0 ? -1 : 0;
    PyObject *result = PyObject_CallFunctionObjArgs(is_free_slow, (PyObject *)block, NULL);
    if (result == NULL)
        return -1;
    int truth = PyObject_IsTrue(result);
    Py_DECREF(result);
    return truth;
}

static int append(PyObject *ring, PyObject *block)
{
    PyObject *result = PyObject_CallMethodObjArgs(ring, append_name, block, NULL);
    Py_XDECREF(result);
    return result == NULL ? -1 : 0;
}

/* As pool.capacity_for; `nbytes` > 0. */
static uint64_t capacity_for(uint64_t nbytes)
{
    uint64_t step = PAGE;
    if (nbytes > COARSE_FROM) {
        uint64_t coarse = (uint64_t)1 << (64 - __builtin_clzll(nbytes) - 4);
        step = coarse > PAGE ? coarse : PAGE;
    }
    return (nbytes + step - 1) / step * step;
}

/* The ring of the blocks for so many bytes: borrowed; NULL if there is none, perhaps with an exception. */
static PyObject *ring_for(uint64_t nbytes)
{
    PyObject *key = PyLong_FromUnsignedLongLong(capacity_for(nbytes));
    PyObject *sizes = key == NULL ? NULL : PyDict_GetItemWithError(rings, key);
    Py_XDECREF(key);
    if (sizes == NULL || (key = PyLong_FromUnsignedLongLong(nbytes)) == NULL)
        return NULL;
    PyObject *ring = PyDict_GetItemWithError(sizes, key);
    Py_DECREF(key);
    return ring;
}

/* A free block out of a ring: a new reference; NULL if there is none, perhaps with an exception. */
static Block *free_block(PyObject *ring)
{
    Py_ssize_t checks = PyObject_Size(ring);
    checks = checks < MAX_CHECKS ? checks : MAX_CHECKS;
    while (checks-- > 0 && PyObject_Size(ring) > 0) {
        Block *block = (Block *)PyObject_CallMethodObjArgs(ring, popleft_name, NULL);
        if (block == NULL)
            return NULL;
        if (!PyObject_TypeCheck((PyObject *)block, Block_Type)) {
            Py_DECREF(block);
            PyErr_SetString(PyExc_TypeError, "a ring has something else than blocks");
            return NULL;
        }
        int unused = block->kind == MADE ? is_free(block) : 0;
        if (unused == 1) {
            block->has_content = 0;
            return block;
        }
        if (block->kind == MADE) {
            PyObject *type, *value, *traceback;
            PyErr_Fetch(&type, &value, &traceback);
            if (append(ring, (PyObject *)block) < 0)
                PyErr_Clear();
            PyErr_Restore(type, value, traceback);
        }
        Py_DECREF(block);
        if (unused < 0)
            return NULL;
    }
    return NULL;
}

/* Takes a free block whose storage has just so many bytes. Returns a new reference to it, and fills `storage` with one
 * to its storage, which keeps it in use; NULL if there is none, perhaps with an exception. With the lock held. */
Block *pool_take_free(uint64_t nbytes, PyObject **storage)
{
    PyObject *ring = rings == NULL ? NULL : ring_for(nbytes);
    if (ring == NULL)
        return NULL;
    Py_INCREF(ring);
    Block *block = free_block(ring);
    if (block != NULL) {
        *storage = block->storage;
        Py_INCREF(*storage);
        block->used_at = monotonic();
        if (append(ring, (PyObject *)block) < 0) {
            Py_CLEAR(*storage);
            Py_DECREF(block);
            block = NULL;
        }
    }
    Py_DECREF(ring);
    return block;
}

/* Copies the tensor's values into the block, and moves the tensor there. */
static int move_to(Block *block, PyObject *tensor, PyObject *storage, const View *view, PyObject *geometry)
{
    PyObject *prototype = block_prototype(block, geometry);
    Py_XINCREF(prototype);
    if (prototype == NULL)
        prototype = PyObject_CallMethod((PyObject *)block, "new_prototype", "(O)", geometry);
    if (prototype == NULL)
        return -1;
    memcpy((void *)(uintptr_t)block->address, (const void *)(uintptr_t)view->address, block->nbytes);
    long owners = call_for_number(tensor_use_count, tensor); /* one in C++, such as DLPack, may point into the memory */
    int result = owners < 0 ? -1 : set_data(data_property, tensor, prototype);
    Py_DECREF(prototype);
    if (result < 0)
        return -1;
    PyObject *left = block->left_memory;
    block->left_memory = owners > 1 ? storage : Py_None;
    Py_INCREF(block->left_memory);
    Py_XDECREF(left);
    return 0;
}

/* Fills `block` with a new reference to the block on which the tensor is now. With the lock held. */
int move_tensor(PyObject *tensor, const View *view, PyObject *geometry, Block **result)
{
    uint64_t nbytes = view_span(view);
    if (sole_references < 0 || !nbytes || nbytes > MAX_BYTES || PyDict_Size(moving))
        return NOT_MINE;
    PyObject *ring = ring_for(nbytes);
    if (ring == NULL)
        return PyErr_Occurred() ? -1 : NOT_MINE;
    Py_INCREF(ring); /* the pool drops an empty one */
    PyObject *storage = PyObject_CallFunctionObjArgs(untyped_storage, tensor, NULL);
    if (storage == NULL) {
        Py_DECREF(ring);
        return -1;
    }
    int found = is_simple(tensor, storage, view, nbytes);
    Block *block = found == 1 ? free_block(ring) : NULL;
    if (block == NULL) {
        Py_DECREF(ring);
        Py_DECREF(storage);
        return PyErr_Occurred() ? -1 : NOT_MINE;
    }
    block->users++; /* finalizers that run meanwhile do not take it */
    block->used_at = monotonic();
    found = append(ring, (PyObject *)block);
    Py_DECREF(ring);
    if (!found && block->nbytes == nbytes)
        found = move_to(block, tensor, storage, view, geometry);
    else if (!found)
        found = NOT_MINE;
    block->users--;
    Py_DECREF(storage);
    if (found)
        Py_DECREF(block);
    else
        *result = block;
    return found;
}

/* set_move(functions, moving, rings, is_free): `functions` are eight of torch, in the order of `places`. */
static PyObject *set_move(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    (void)module;
    PyObject **places[] = {&untyped_storage, &is_shared,        &num_bytes,      &data_pointer,
                           &is_inference,    &tensor_use_count, &cdata_property, &data_property};
    const Py_ssize_t wanted = sizeof places / sizeof *places;
    if (count != 4 || !PyTuple_Check(args[0]) || PyTuple_Size(args[0]) != wanted || !PyDict_Check(args[1]) ||
        !PyDict_Check(args[2])) {
        PyErr_SetString(PyExc_TypeError, "set_move() takes functions, two dicts and a function");
        return NULL;
    }
    for (Py_ssize_t index = 0; index < wanted; index++) {
        *places[index] = PyTuple_GetItem(args[0], index);
        Py_INCREF(*places[index]); /* as the others, for as long as the process lives */
    }
    Py_INCREF(args[1]), Py_INCREF(args[2]), Py_INCREF(args[3]);
    moving = args[1], rings = args[2], is_free_slow = args[3];
    get_cdata = (descrgetfunc)PyType_GetSlot(Py_TYPE(cdata_property), Py_tp_descr_get);
    set_data = (descrsetfunc)PyType_GetSlot(Py_TYPE(data_property), Py_tp_descr_set);
    popleft_name = PyUnicode_InternFromString("popleft");
    append_name = PyUnicode_InternFromString("append");
    if (popleft_name == NULL || append_name == NULL)
        return NULL;
    if (get_cdata == NULL || set_data == NULL)
        Py_RETURN_FALSE;
    Py_RETURN_TRUE;
}

/* calibrate_move(tensor): learn the counts of this tensor, which alone owns its memory. */
static PyObject *calibrate_move(PyObject *module, PyObject *tensor)
{
    (void)module;
    if (untyped_storage == NULL) {
        PyErr_SetString(PyExc_RuntimeError, "set_move() has not been called");
        return NULL;
    }
    PyObject *storage = PyObject_CallFunctionObjArgs(untyped_storage, tensor, NULL);
    if (storage == NULL)
        return NULL;
    sole_references = reference_count(storage);
    Py_DECREF(storage);
    Py_RETURN_NONE;
}

static PyMethodDef functions[] = {
    {"set_move", (PyCFunction)(void (*)(void))set_move, METH_FASTCALL, NULL},
    {"calibrate_move", calibrate_move, METH_O, NULL},
    {NULL, NULL, 0, NULL},
};

int add_move(PyObject *module)
{
    return add_functions(module, functions);
}
