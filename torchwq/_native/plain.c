/* Encodes and decodes the most frequent messages: a plain dense tensor, or a flat dict, list or tuple of them.
 * Its twin: marshalling/fast_path.py, which also says what a shape is.
 *
 * A message is the shape's prefix (the pickle), a reference for each tensor, and the number of references; then comes
 * the trailer. Whatever this file does not know, or finds otherwise than it expects, it leaves to the twin before it has
 * changed anything: its functions return None then.
 *
 * Invariants:
 *
 * * While C code holds borrowed pointers to tensors or blocks, it calls nothing that could run other Python code, or it
 *   owns references to them. Looking at a tensor may run a user's torch function mode.
 * * A received reference is counted after its tensor exists, under the lock, as the twin does it.
 * * Everything in a message is checked before it is believed: lengths, the number of references, rows, sizes. The prefix
 *   is compared byte for byte with one that this process has made. The offsets and sizes in it were checked by torch
 *   when the prototype was made.
 */

#include "core.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define MAX_TENSORS 64
#define MAX_SHAPES 1024
#define TABLE (4 * MAX_SHAPES)

#define MAX_PREFIX 32768

typedef struct {
    int code;
    int ndim;
    int64_t offset;
    const int64_t *sizes;
    const int64_t *strides;
} Part;

typedef struct {
    PyObject_HEAD
    PyObject *cls;        /* dict, list, tuple, or torch.Tensor */
    PyObject *keys;       /* tuple of str */
    PyObject *geometries; /* tuple, as the twin has it */
    PyObject *prefix;     /* bytes */
    uint64_t key_hash;    /* see `hash_of_views` */
    uint64_t prefix_hash;
    Py_ssize_t count;
    PyObject *key;    /* what the twin has for the shape, if it has slices; else NULL */
    PyObject *shifts; /* tuple: where each slice begins; -1 for a tensor with a block of its own */
    Py_ssize_t blocks; /* how many a message has */
    Part *parts;
    int64_t *numbers; /* the memory of the parts' sizes and strides */
} Shape;

static PyTypeObject *Shape_Type;

static PyObject *loads; /* pickle's */
static PyObject *key_name, *prototypes_name, *addresses_name;

/* Both tables have the same shapes: one to encode, one to decode. They own one reference to each, in `by_prefix`. */
static Shape *by_views[TABLE], *by_prefix[TABLE];
static size_t num_shapes;

/* --- hashes --- */

static uint64_t mix(uint64_t hash, uint64_t value)
{
    hash = (hash ^ value) * 0x9E3779B97F4A7C15u;
    return hash ^ hash >> 29;
}

static uint64_t hash_of_bytes(const char *bytes, size_t size)
{
    uint64_t hash = size, word;
    for (; size >= 8; bytes += 8, size -= 8) {
        memcpy(&word, bytes, 8);
        hash = mix(hash, word);
    }
    word = 0;
    memcpy(&word, bytes, size);
    return mix(hash, word);
}

static uint64_t hash_of_view(uint64_t hash, int code, int ndim, const int64_t *sizes, const int64_t *strides)
{
    hash = mix(hash, (uint64_t)code << 8 | (uint64_t)ndim);
    for (int dim = 0; dim < ndim; dim++)
        hash = mix(mix(hash, (uint64_t)sizes[dim]), (uint64_t)strides[dim]);
    return hash;
}

static bool hash_of_keys(PyObject *cls, PyObject *const *keys, Py_ssize_t count, uint64_t *hash)
{
    *hash = mix((uint64_t)(uintptr_t)cls, (uint64_t)count);
    for (Py_ssize_t index = 0; keys != NULL && index < count; index++) {
        Py_hash_t value = PyObject_Hash(keys[index]);
        if (value == -1)
            return false;
        *hash = mix(*hash, (uint64_t)value);
    }
    return true;
}

/* --- shapes --- */

static void shape_dealloc(PyObject *op)
{
    Shape *self = (Shape *)op;
    Py_XDECREF(self->cls);
    Py_XDECREF(self->keys);
    Py_XDECREF(self->geometries);
    Py_XDECREF(self->prefix);
    Py_XDECREF(self->key);
    Py_XDECREF(self->shifts);
    free(self->parts);
    free(self->numbers);
    free_object(op);
}

static PyType_Slot shape_slots[] = {
    {Py_tp_dealloc, shape_dealloc},
    {0, NULL},
};

static PyType_Spec shape_spec = {
    .name = "torchwq._native._core.Shape",
    .basicsize = sizeof(Shape),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = shape_slots,
};

/* Reads (code, offset, size, stride) into `part`, whose numbers go to `place`. */
static bool read_geometry(PyObject *geometry, Part *part, int64_t *place)
{
    int code;
    long long offset;
    PyObject *size, *stride;
    if (!PyArg_ParseTuple(geometry, "iLOO", &code, &offset, &size, &stride))
        return false;
    Py_ssize_t ndim = PySequence_Size(size);
    if (ndim < 0 || ndim != PySequence_Size(stride) || ndim > MAX_DIMS) {
        PyErr_SetString(PyExc_ValueError, "this is no geometry");
        return false;
    }
    part->code = code, part->offset = offset, part->ndim = (int)ndim;
    part->sizes = place, part->strides = place + ndim;
    for (Py_ssize_t at = 0; at < 2 * ndim; at++) {
        PyObject *item = PySequence_GetItem(at < ndim ? size : stride, at % (ndim ? ndim : 1));
        if (item == NULL)
            return false;
        place[at] = PyLong_AsLongLong(item);
        Py_DECREF(item);
        if (PyErr_Occurred())
            return false;
    }
    return true;
}

static Shape *shape_new(PyObject *cls, PyObject *keys, PyObject *geometries, PyObject *prefix)
{
    Shape *self = (Shape *)PyType_GenericAlloc(Shape_Type, 0);
    if (self == NULL)
        return NULL;
    Py_INCREF(cls), Py_INCREF(keys), Py_INCREF(geometries), Py_INCREF(prefix);
    self->cls = cls, self->keys = keys, self->geometries = geometries, self->prefix = prefix;
    self->count = self->blocks = PyTuple_Size(geometries);
    self->parts = calloc((size_t)self->count, sizeof *self->parts);
    self->numbers = calloc((size_t)self->count * 2 * MAX_DIMS, sizeof *self->numbers);
    if (self->parts == NULL || self->numbers == NULL) {
        PyErr_NoMemory();
        goto failed;
    }
    PyObject *hashed[MAX_TENSORS];
    for (Py_ssize_t index = 0; index < PyTuple_Size(keys); index++)
        hashed[index] = PyTuple_GetItem(keys, index);
    if (!hash_of_keys(cls, PyTuple_Size(keys) ? hashed : NULL, self->count, &self->key_hash))
        goto failed;
    for (Py_ssize_t index = 0; index < self->count; index++) {
        Part *part = &self->parts[index];
        if (!read_geometry(PyTuple_GetItem(geometries, index), part, self->numbers + index * 2 * MAX_DIMS))
            goto failed;
        self->key_hash = hash_of_view(self->key_hash, part->code, part->ndim, part->sizes, part->strides);
    }
    self->prefix_hash = hash_of_bytes(PyBytes_AsString(prefix), (size_t)PyBytes_Size(prefix));
    return self;
failed:
    Py_DECREF(self);
    return NULL;
}

static void clear_shapes(void)
{
    for (size_t index = 0; index < TABLE; index++) {
        by_views[index] = NULL;
        Shape *shape = by_prefix[index];
        by_prefix[index] = NULL;
        Py_XDECREF(shape);
    }
    num_shapes = 0;
}

/* Lets the shape have slices, as its messages do. */
static int set_slices(Shape *shape, PyObject *shifts, PyObject *key)
{
    if (PyTuple_Size(shifts) != shape->count) {
        PyErr_SetString(PyExc_ValueError, "there must be one shift for each tensor");
        return -1;
    }
    Py_ssize_t own = 0;
    for (Py_ssize_t index = 0; index < shape->count; index++) {
        long long shift = PyLong_AsLongLong(PyTuple_GetItem(shifts, index));
        if (shift == -1 && PyErr_Occurred())
            return -1;
        own += shift < 0;
    }
    Py_INCREF(shifts), Py_INCREF(key);
    shape->shifts = shifts, shape->key = key, shape->blocks = own + 1;
    return 0;
}

/* add_shape(cls, keys, geometries, shifts, prefix, key): know this shape from now on, which is `key` in the twin. A shape
 * with slices is known for decoding only. */
static PyObject *add_shape(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    (void)module;
    if (count != 6 || !PyTuple_Check(args[1]) || !PyTuple_Check(args[2]) || !PyTuple_Check(args[3]) ||
        !PyBytes_Check(args[4])) {
        PyErr_SetString(PyExc_TypeError, "add_shape() takes a class, keys, geometries, shifts, a prefix and a key");
        return NULL;
    }
    Py_ssize_t tensors = PyTuple_Size(args[2]), keys = PyTuple_Size(args[1]);
    if (tensors < 1 || tensors > MAX_TENSORS || keys != (args[0] == (PyObject *)&PyDict_Type ? tensors : 0))
        Py_RETURN_NONE; /* the twin keeps it */
    Shape *shape = shape_new(args[0], args[1], args[2], args[4]);
    if (shape == NULL)
        return NULL;
    if (PyTuple_Size(args[3]) && set_slices(shape, args[3], args[5]) < 0) {
        Py_DECREF(shape);
        return NULL;
    }
    if (num_shapes >= MAX_SHAPES)
        clear_shapes();
    size_t at;
    for (at = shape->prefix_hash % TABLE; by_prefix[at] != NULL; at = (at + 1) % TABLE)
        ;
    by_prefix[at] = shape; /* owns it */
    num_shapes++;
    if (shape->key != NULL)
        Py_RETURN_NONE;
    for (at = shape->key_hash % TABLE; by_views[at] != NULL; at = (at + 1) % TABLE)
        ;
    by_views[at] = shape;
    Py_RETURN_NONE;
}

static Shape *shape_of_prefix(const char *prefix, size_t size)
{
    uint64_t hash = hash_of_bytes(prefix, size);
    for (size_t at = hash % TABLE; by_prefix[at] != NULL; at = (at + 1) % TABLE) {
        Shape *shape = by_prefix[at];
        if (shape->prefix_hash == hash && (size_t)PyBytes_Size(shape->prefix) == size &&
            !memcmp(PyBytes_AsString(shape->prefix), prefix, size))
            return shape;
    }
    return NULL;
}

static bool has_keys(const Shape *shape, PyObject *const *keys)
{
    for (Py_ssize_t index = 0; index < PyTuple_Size(shape->keys); index++) {
        PyObject *key = PyTuple_GetItem(shape->keys, index);
        if (key != keys[index] && PyUnicode_Compare(key, keys[index]))
            return false;
    }
    return true;
}

static bool has_view(const Part *part, const View *view)
{
    size_t size = (size_t)view->ndim * sizeof(int64_t);
    return part->code == view->code && part->ndim == view->ndim && part->offset == 0 &&
           (!size || (!memcmp(part->sizes, view->sizes, size) && !memcmp(part->strides, view->strides, size)));
}

static Shape *shape_of_views(PyObject *cls, PyObject *const *keys, const View *views, Py_ssize_t count)
{
    uint64_t hash;
    if (!hash_of_keys(cls, keys, count, &hash)) {
        PyErr_Clear();
        return NULL;
    }
    for (Py_ssize_t index = 0; index < count; index++)
        hash = hash_of_view(hash, views[index].code, views[index].ndim, views[index].sizes, views[index].strides);
    for (size_t at = hash % TABLE; by_views[at] != NULL; at = (at + 1) % TABLE) {
        Shape *shape = by_views[at];
        if (shape->key_hash != hash || shape->cls != cls || shape->count != count || (keys && !has_keys(shape, keys)))
            continue;
        Py_ssize_t index = 0;
        while (index < count && has_view(&shape->parts[index], &views[index]))
            index++;
        if (index == count)
            return shape;
    }
    return NULL;
}

/* --- encoding --- */

/* The tensors of an object, to which it has references, and the keys of a dict, borrowed from it. */
typedef struct {
    PyObject *cls;
    Py_ssize_t count;
    bool has_keys;
    PyObject *tensors[MAX_TENSORS];
    PyObject *keys[MAX_TENSORS];
} Content;

static void drop_content(Content *content)
{
    for (Py_ssize_t index = 0; index < content->count; index++) {
        Py_DECREF(content->tensors[index]);
        if (content->has_keys)
            Py_DECREF(content->keys[index]);
    }
}

static int find_content(PyObject *obj, Content *content)
{
    PyTypeObject *cls = Py_TYPE(obj);
    content->cls = (PyObject *)cls, content->count = 0, content->has_keys = false;
    if (!torch_is_tensor(obj) && cls != &PyDict_Type && cls != &PyList_Type && cls != &PyTuple_Type)
        return NOT_MINE;
    if (torch_is_tensor(obj)) {
        Py_INCREF(obj);
        content->tensors[content->count++] = obj;
        return 0;
    }
    Py_ssize_t size = PyObject_Size(obj), at = 0;
    if (size < 1 || size > MAX_TENSORS) {
        PyErr_Clear();
        return NOT_MINE;
    }
    PyObject *key, *value;
    if (cls == &PyDict_Type) {
        content->has_keys = true;
        while (PyDict_Next(obj, &at, &key, &value)) {
            if (!torch_is_tensor(value) || Py_TYPE(key) != &PyUnicode_Type)
                goto not_mine;
            Py_INCREF(key), Py_INCREF(value);
            content->keys[content->count] = key, content->tensors[content->count++] = value;
        }
        return 0;
    }
    for (; at < size; at++) {
        value = cls == &PyList_Type ? PyList_GetItem(obj, at) : PyTuple_GetItem(obj, at);
        if (value == NULL || !torch_is_tensor(value))
            goto not_mine;
        Py_INCREF(value);
        content->tensors[content->count++] = value;
    }
    return 0;
not_mine:
    PyErr_Clear();
    drop_content(content);
    return NOT_MINE;
}

static PyObject *tuple_of(PyObject **items, Py_ssize_t count)
{
    PyObject *tuple = PyTuple_New(count);
    for (Py_ssize_t index = 0; tuple != NULL && index < count; index++) {
        Py_INCREF(items[index]);
        PyTuple_SetItem(tuple, index, items[index]);
    }
    return tuple;
}

static PyObject *tuple_of_numbers(const uint64_t *numbers, Py_ssize_t count)
{
    PyObject *tuple = PyTuple_New(count);
    for (Py_ssize_t index = 0; tuple != NULL && index < count; index++) {
        PyObject *number = PyLong_FromUnsignedLongLong(numbers[index]);
        if (number == NULL || PyTuple_SetItem(tuple, index, number) < 0)
            Py_CLEAR(tuple);
    }
    return tuple;
}

/* The message of these blocks, which keeps their `storages`. */
static PyObject *make_message(const Shape *shape, Block *const *blocks, PyObject **storages, Py_ssize_t limit)
{
    Py_ssize_t count = shape->count, size = PyBytes_Size(shape->prefix);
    Py_ssize_t length = size + count * REFERENCE_SIZE + COUNT_SIZE;
    if (length > limit)
        Py_RETURN_NONE;
    uint64_t numbers[MAX_TENSORS], fds[MAX_TENSORS], nbytes = 0;
    PyObject *data = PyBytes_FromStringAndSize(NULL, length), *result = NULL;
    if (data == NULL)
        return NULL;
    char *at = PyBytes_AsString(data);
    memcpy(at, PyBytes_AsString(shape->prefix), (size_t)size);
    at += size;
    for (Py_ssize_t index = 0; index < count; index++, at += REFERENCE_SIZE) {
        numbers[index] = blocks[index]->number, fds[index] = (uint64_t)blocks[index]->fd;
        memcpy(at, &blocks[index]->number, 8);
        memcpy(at + 8, &blocks[index]->nbytes, 8);
        nbytes += blocks[index]->nbytes;
    }
    uint32_t references = (uint32_t)count;
    memcpy(at, &references, COUNT_SIZE);
    PyObject *of_numbers = tuple_of_numbers(numbers, count), *of_fds = tuple_of_numbers(fds, count);
    PyObject *keep = tuple_of(storages, count);
    if (of_numbers != NULL && of_fds != NULL && keep != NULL)
        result = message_new(data, of_fds, keep, of_numbers, nbytes);
    Py_DECREF(data);
    Py_XDECREF(of_numbers);
    Py_XDECREF(of_fds);
    Py_XDECREF(keep);
    return result;
}

/* Whether the view is on a block that can be sent under its number. */
static bool is_on(const View *view, const Block *block)
{
    uint64_t span = view_span(view);
    return span && span <= block->nbytes && block->kind <= MAPPED && block->storage != NULL &&
           block->storage != Py_None && block->fd >= 0 && block->number != UNTRACKED && memory.counts != NULL && counts_is_current(memory.counts, block->number);
}

/* Finds the blocks of the tensors: fills `blocks`, as far as it comes, with new references. With the lock held. */
static int find_blocks(const Content *content, const Shape *shape, const View *views, Block **blocks, Py_ssize_t *owned)
{
    for (Py_ssize_t index = 0; index < content->count; index++) {
        Block *block = memory_block_at(views[index].address);
        if (block != NULL)
            Py_INCREF(block);
        else if (PyErr_Occurred())
            return -1;
        else {
            PyObject *geometry = PyTuple_GetItem(shape->geometries, index);
            int found = move_tensor(content->tensors[index], &views[index], geometry, &block);
            if (found)
                return found;
        }
        blocks[(*owned)++] = block;
        for (Py_ssize_t other = 0; other < index; other++)
            if (blocks[other] == block)
                return NOT_MINE; /* tensors that share a block, or one tensor twice */
    }
    return 0;
}

/* Fills `storages` with new references to those of the blocks: 0, or NOT_MINE. Only now, because a finalizer that has run
 * meanwhile may have retired one of the first blocks. */
static int find_storages(const View *views, Block *const *blocks, Py_ssize_t count, PyObject **storages)
{
    for (Py_ssize_t index = 0; index < count; index++)
        if (!is_on(&views[index], blocks[index]))
            return NOT_MINE;
    for (Py_ssize_t index = 0; index < count; index++) {
        storages[index] = blocks[index]->storage;
        Py_INCREF(storages[index]);
    }
    return 0;
}

/* Leaves an error to the twin, which meets it again, and says of which object. Not what ends the program. */
static int without_error(int found)
{
    if (found >= 0 || !PyErr_ExceptionMatches(PyExc_Exception))
        return found;
    PyErr_Clear();
    return NOT_MINE;
}

static int encode_content(const Content *content, Py_ssize_t limit, PyObject **result)
{
    View views[MAX_TENSORS];
    Block *blocks[MAX_TENSORS];
    PyObject *storages[MAX_TENSORS];
    Py_ssize_t owned = 0;
    for (Py_ssize_t index = 0; index < content->count; index++) {
        int found = without_error(torch_look(content->tensors[index], &views[index]));
        if (found)
            return found;
    }
    Shape *shape = shape_of_views(content->cls, content->has_keys ? content->keys : NULL, views, content->count);
    if (shape == NULL)
        return NOT_MINE;
    Py_INCREF(shape);
    int found = memory_lock(0);
    if (!found) {
        found = without_error(find_blocks(content, shape, views, blocks, &owned));
        if (!found)
            found = find_storages(views, blocks, owned, storages);
        if (!found) {
            *result = make_message(shape, blocks, storages, limit);
            for (Py_ssize_t index = 0; index < owned; index++)
                Py_DECREF(storages[index]);
        }
        memory_unlock();
    }
    Py_DECREF(shape);
    while (owned)
        Py_DECREF(blocks[--owned]);
    return found ? found : *result == NULL ? -1 : 0;
}

/* encode_plain(obj, limit): the message of a tensor, or of a dict, list or tuple of tensors; the pickle of an object of
 * built-in types. None if it is the twin's. */
static PyObject *encode_plain(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    (void)module;
    if (count != 2) {
        PyErr_SetString(PyExc_TypeError, "encode_plain() takes an object and the limit");
        return NULL;
    }
    Py_ssize_t limit = PyLong_AsSsize_t(args[1]);
    if (limit == -1 && PyErr_Occurred())
        return NULL;
    Content content;
    if (!memory_ready() || find_content(args[0], &content))
        return builtin_dumps(args[0], limit);
    PyObject *result = NULL;
    int found = encode_content(&content, limit, &result);
    drop_content(&content);
    if (found == NOT_MINE)
        Py_RETURN_NONE;
    return result;
}

/* --- decoding --- */

static PyObject *build(const Shape *shape, PyObject **tensors)
{
    if (torch_is_class(shape->cls)) {
        Py_INCREF(tensors[0]);
        return tensors[0];
    }
    if (shape->cls == (PyObject *)&PyDict_Type) {
        PyObject *dict = PyDict_New();
        for (Py_ssize_t index = 0; dict != NULL && index < shape->count; index++)
            if (PyDict_SetItem(dict, PyTuple_GetItem(shape->keys, index), tensors[index]) < 0)
                Py_CLEAR(dict);
        return dict;
    }
    if (shape->cls == (PyObject *)&PyTuple_Type)
        return tuple_of(tensors, shape->count);
    PyObject *list = PyList_New(shape->count);
    for (Py_ssize_t index = 0; list != NULL && index < shape->count; index++) {
        Py_INCREF(tensors[index]);
        PyList_SetItem(list, index, tensors[index]);
    }
    return list;
}

/* A new tensor on the block: a new reference. */
static PyObject *new_tensor(Block *block, PyObject *geometry)
{
    PyObject *prototype = block_prototype(block, geometry);
    Py_XINCREF(prototype);
    if (prototype == NULL)
        prototype = PyObject_CallMethod((PyObject *)block, "new_prototype", "(O)", geometry);
    if (prototype == NULL)
        return NULL;
    PyObject *tensor = torch_detach(prototype);
    Py_DECREF(prototype);
    return tensor;
}

/* Whether the prototypes are where they were made: see memory.block_fields.SlicePrototypes. */
static bool are_in_place(PyObject *prototypes, PyObject *addresses)
{
    Py_ssize_t count = PyList_Check(prototypes) && PyList_Check(addresses) ? PyList_Size(addresses) : -1;
    if (count < 0 || PyList_Size(prototypes) != count)
        return false;
    for (Py_ssize_t index = 0; index < count; index++) {
        PyObject *prototype = PyList_GetItem(prototypes, index);
        uint64_t address = PyLong_AsUnsignedLongLong(PyList_GetItem(addresses, index));
        if (!torch_is_tensor(prototype) || !torch_is_at(prototype, address))
            return false;
    }
    return true;
}

/* The prototypes that the block has, if they are of this shape and in their places: a new reference. NULL if not, perhaps
 * with an exception. */
static PyObject *cached_prototypes(PyObject *cached, const Shape *shape)
{
    PyObject *key = PyObject_GetAttr(cached, key_name);
    Py_XDECREF(key); /* only compared */
    if (key == NULL || key != shape->key)
        return NULL;
    PyObject *prototypes = PyObject_GetAttr(cached, prototypes_name);
    PyObject *addresses = prototypes == NULL ? NULL : PyObject_GetAttr(cached, addresses_name);
    if (addresses == NULL || !are_in_place(prototypes, addresses))
        Py_CLEAR(prototypes);
    Py_XDECREF(addresses);
    return prototypes;
}

/* The tensors that are slices of the block, to make others of, as a list: a new reference. */
static PyObject *prototypes_of_slices(Block *pack, const Shape *shape)
{
    PyObject *cached = pack->slice_prototypes;
    if (cached != NULL && cached != Py_None) {
        Py_INCREF(cached);
        PyObject *found = cached_prototypes(cached, shape);
        Py_DECREF(cached);
        if (found != NULL || PyErr_Occurred())
            return found;
    }
    return PyObject_CallMethod((PyObject *)pack, "new_slice_prototypes", "OOO", shape->key, shape->geometries,
                               shape->shifts);
}

static int take_slices(const Shape *shape, Block **blocks, PyObject **tensors)
{
    PyObject *prototypes = prototypes_of_slices(blocks[shape->blocks - 1], shape);
    if (prototypes == NULL || !PyList_Check(prototypes)) {
        Py_XDECREF(prototypes);
        return PyErr_Occurred() ? -1 : NOT_MINE;
    }
    Py_ssize_t own = 0, sliced = 0;
    int result = 0;
    for (Py_ssize_t index = 0; !result && index < shape->count; index++) {
        if (PyLong_AsLongLong(PyTuple_GetItem(shape->shifts, index)) < 0)
            tensors[index] = new_tensor(blocks[own++], PyTuple_GetItem(shape->geometries, index));
        else {
            PyObject *prototype = PyList_GetItem(prototypes, sliced++);
            Py_XINCREF(prototype);
            tensors[index] = prototype == NULL ? NULL : torch_detach(prototype);
            Py_XDECREF(prototype);
        }
        result = tensors[index] == NULL ? -1 : 0;
    }
    Py_DECREF(prototypes);
    return result;
}

/* Takes the references, with the lock held. Fills `tensors`, as far as it comes, with new references. */
static int take(const Shape *shape, const char *references, PyObject **tensors)
{
    Block *blocks[MAX_TENSORS];
    Py_ssize_t count = shape->blocks, owned = 0;
    int result = NOT_MINE;
    if (memory.counts == NULL)
        return NOT_MINE;
    for (; owned < count; owned++, references += REFERENCE_SIZE) {
        uint64_t number, nbytes;
        memcpy(&number, references, 8);
        memcpy(&nbytes, references + 8, 8);
        blocks[owned] = memory_block(number, nbytes);
        if (blocks[owned] == NULL)
            goto done;
        Py_INCREF(blocks[owned]);
    }
    if (shape->key != NULL) {
        result = take_slices(shape, blocks, tensors);
        if (result)
            goto done;
    }
    result = -1;
    for (Py_ssize_t index = 0; shape->key == NULL && index < count; index++) {
        tensors[index] = new_tensor(blocks[index], PyTuple_GetItem(shape->geometries, index));
        if (tensors[index] == NULL)
            goto done;
    }
    double now = monotonic();
    for (Py_ssize_t index = 0; index < count; index++) {
        Block *block = blocks[index];
        if (memory.counts != NULL)
            counts_received(memory.counts, block->number, block->kind == MAPPED ? STATE_IN_USE : 0);
        if (block->kind == MAPPED) {
            block->used_at = now;
            if (poller_add(memory.poller, block) < 0)
                goto done;
        }
    }
    memory.hits += (uint64_t)count;
    result = 0;
done:
    while (owned)
        Py_DECREF(blocks[--owned]);
    return result;
}

/* Closes the descriptors, and empties the list. Leaves an exception that is set as it is. */
static void close_fds(PyObject *fds)
{
    Py_ssize_t count = PyList_Size(fds);
    if (count <= 0)
        return;
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    for (Py_ssize_t index = 0; index < count; index++) {
        long fd = PyLong_AsLong(PyList_GetItem(fds, index));
        if (fd >= 0)
            close((int)fd);
    }
    PyErr_Clear(); /* what is no number is no descriptor */
    if (PyList_SetSlice(fds, 0, count, NULL) < 0)
        PyErr_Clear();
    PyErr_Restore(type, value, traceback);
}

/* The object in a message with references; closes `fds` and empties the list, also if it fails. NotImplemented if it is the
 * twin's. */
static PyObject *decode_references(const char *data, Py_ssize_t size, PyObject *fds)
{
    if (size < TRAILER + COUNT_SIZE + REFERENCE_SIZE || !memory_ready())
        Py_RETURN_NOTIMPLEMENTED;
    uint32_t count;
    memcpy(&count, data + size - TRAILER - COUNT_SIZE, COUNT_SIZE);
    bool is_packed = count & PACKED;
    count &= ~PACKED;
    Py_ssize_t start = size - TRAILER - COUNT_SIZE - (Py_ssize_t)count * REFERENCE_SIZE;
    if (count < 1 || count > MAX_TENSORS || start < 1)
        Py_RETURN_NOTIMPLEMENTED;
    Shape *shape = shape_of_prefix(data, (size_t)start);
    if (shape == NULL || shape->blocks != (Py_ssize_t)count || (shape->key != NULL) != is_packed)
        Py_RETURN_NOTIMPLEMENTED;
    Py_INCREF(shape);
    PyObject *tensors[MAX_TENSORS] = {NULL}, *result = NULL;
    int found = memory_lock(shape->count);
    if (!found) {
        found = take(shape, data + start, tensors);
        memory_unlock();
    }
    if (!found)
        result = build(shape, tensors);
    for (Py_ssize_t index = 0; index < shape->count; index++)
        Py_XDECREF(tensors[index]);
    Py_DECREF(shape);
    if (found == NOT_MINE)
        Py_RETURN_NOTIMPLEMENTED;
    close_fds(fds);
    return result;
}

/* decode_plain(data, fds): the object in the message, whose descriptors are closed, and the list emptied, also if it fails;
 * NotImplemented if it is the twin's. */
static PyObject *decode_plain(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    (void)module;
    char *data;
    Py_ssize_t size;
    if (count != 2) {
        PyErr_SetString(PyExc_TypeError, "decode_plain() takes the data and the descriptors");
        return NULL;
    }
    if (!PyBytes_CheckExact(args[0]) || !PyList_Check(args[1]))
        Py_RETURN_NOTIMPLEMENTED;
    if (PyBytes_AsStringAndSize(args[0], &data, &size) < 0)
        return NULL;
    int kind = size ? (unsigned char)data[size - 1] : -1;
    if (kind == REFERENCES)
        return decode_references(data, size, args[1]);
    if ((kind != BARE && kind != PICKLE) || loads == NULL || PyList_Size(args[1]) != 0)
        Py_RETURN_NOTIMPLEMENTED;
    PyObject *result = builtin_loads(data, size);
    return result != NULL ? result : PyObject_CallFunctionObjArgs(loads, args[0], NULL);
}

/* set_loads(loads) */
static PyObject *set_loads(PyObject *module, PyObject *function)
{
    (void)module;
    Py_INCREF(function); /* for as long as the process lives */
    loads = function;
    Py_RETURN_NONE;
}

static PyObject *clear_shapes_function(PyObject *module, PyObject *unused)
{
    (void)module, (void)unused;
    clear_shapes();
    Py_RETURN_NONE;
}

static PyMethodDef functions[] = {
    {"add_shape", (PyCFunction)(void (*)(void))add_shape, METH_FASTCALL, NULL},
    {"encode_plain", (PyCFunction)(void (*)(void))encode_plain, METH_FASTCALL, NULL},
    {"decode_plain", (PyCFunction)(void (*)(void))decode_plain, METH_FASTCALL, NULL},
    {"set_loads", set_loads, METH_O, NULL},
    {"clear_shapes", clear_shapes_function, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

int add_plain(PyObject *module)
{
    Shape_Type = add_type(module, &shape_spec);
    key_name = PyUnicode_InternFromString("key"), prototypes_name = PyUnicode_InternFromString("prototypes");
    addresses_name = PyUnicode_InternFromString("addresses");
    if (Shape_Type == NULL || key_name == NULL || prototypes_name == NULL || addresses_name == NULL)
        return -1;
    return add_functions(module, functions);
}
