/* Collates samples as torch's default collation does, into shared memory: without a call of torch for each tensor, and,
 * where the batch is a flat collection, without making its tensors at all. Its twin: loading/collation.py, with torch.
 *
 * A batch is made in three steps. `scan` learns the structure of the first sample. Then memory is taken for all values
 * of the batch. `fill` compares each sample with that structure, and copies its values to their places. A sample that
 * differs, and whatever this file does not know, leaves the whole batch to torch, which has its own rules and errors
 * for it: until then only memory was taken, and it goes back.
 *
 * Invariants:
 *
 * * What torch gives for the same samples is given here: the types of collections, dtypes, sizes, contiguous strides.
 *   So samples must be contiguous, with the strides that torch gives a new tensor: of others torch may keep the order.
 * * Between the look at a tensor and the copying of its memory nothing runs that could free it. Where other threads may
 *   run meanwhile, an alias keeps it.
 * * Looking at a tensor may run the garbage collector, and so any code. Collections are owned while it is inside them,
 *   and each access checks their size.
 */

#include "core.h"

#include <string.h>

#define MAX_LEAVES 64 /* as fast_path._MAX_TENSORS */
#define MAX_NODES 256
#define MAX_DEPTH 16
#define MAX_LAYOUTS 1024
#define TABLE (2 * MAX_LAYOUTS)

#define MAX_BYTES ((uint64_t)1 << 48)
#define WITHOUT_GIL (128 * 1024) /* bytes of a sample whose copying takes longer than letting other threads run */

enum { TENSOR, INT, FLOAT, STRINGS, TUPLE, LIST, DICT, NAMED_TUPLE };

typedef struct {
    int kind;
    int leaf;           /* TENSOR, INT, FLOAT: index of its leaf */
    int end;            /* index of the node after its children */
    Py_ssize_t count;   /* of its children */
    PyObject *key;      /* of a dict's child */
    PyObject *cls;      /* NAMED_TUPLE */
    PyObject *strings;  /* STRINGS: a list of them */
} Node;

typedef struct {
    View view;         /* of a sample; of its address nothing is known later */
    uint64_t item;     /* bytes of a sample */
    uint64_t nbytes;   /* bytes of all */
    char *memory;      /* of the batch's tensor */
    PyObject *tensor;  /* NULL while there is none */
} Leaf;

typedef struct {
    PyObject *samples;
    Py_ssize_t count; /* of samples */
    int num_nodes;
    int num_leaves;
    bool has_strings;
    Node nodes[MAX_NODES]; /* each node's children come after it, in order */
    Leaf leaves[MAX_LEAVES];
} Batch;

/* Where a flat batch's tensors are in a message: see `set_collate`. */
typedef struct {
    uint64_t hash;
    Py_ssize_t samples;
    int kind; /* of the collection; TENSOR if there is none */
    int count;
    PyObject *keys;      /* tuple; of a dict only */
    PyObject *prefix;    /* bytes */
    uint64_t pack;       /* bytes of the block with slices; 0 if there is none */
    int64_t *shifts;     /* where each slice begins; -1 for a tensor with a block of its own */
    View *views;         /* of the samples */
} Layout;

static Layout *layouts[TABLE];
static size_t num_layouts;

/* Of the twin and torch: see `set_collate`. */
static PyObject *function_map, *known_map;
static PyObject *function_modes, *dispatch_modes;
static PyObject *new_tensor, *reserve, *prepare_to_send, *lay_out;
static int code_of_int = -1, code_of_float = -1;

/* --- the structure of a sample --- */

/* The twin raises what there is to raise. */
static int not_mine(void)
{
    PyErr_Clear();
    return NOT_MINE;
}

static void drop_batch(Batch *batch)
{
    for (int index = 0; index < batch->num_nodes; index++) {
        Py_XDECREF(batch->nodes[index].key);
        Py_XDECREF(batch->nodes[index].cls);
        Py_XDECREF(batch->nodes[index].strings);
    }
    for (int index = 0; index < batch->num_leaves; index++)
        Py_XDECREF(batch->leaves[index].tensor);
}

/* Whether the strides are those of a new tensor of these sizes, and it has elements. */
static bool is_as_new(const View *view)
{
    int64_t stride = 1;
    for (int dim = view->ndim - 1; dim >= 0; dim--) {
        if (view->sizes[dim] <= 0 || view->strides[dim] != stride ||
            __builtin_mul_overflow(stride, view->sizes[dim], &stride))
            return false;
    }
    return true;
}

/* Lets the node have a leaf, whose view is known. */
static int add_leaf(Batch *batch, Node *node, const View *view)
{
    if (batch->num_leaves == MAX_LEAVES || view->ndim >= MAX_DIMS || !is_as_new(view))
        return NOT_MINE;
    Leaf *leaf = &batch->leaves[batch->num_leaves];
    leaf->view.code = view->code, leaf->view.itemsize = view->itemsize, leaf->view.ndim = view->ndim;
    memcpy(leaf->view.sizes, view->sizes, (size_t)view->ndim * sizeof(int64_t));
    memcpy(leaf->view.strides, view->strides, (size_t)view->ndim * sizeof(int64_t));
    leaf->tensor = NULL, leaf->memory = NULL;
    leaf->item = view_span(view);
    if (!leaf->item || leaf->item > MAX_BYTES / (uint64_t)batch->count)
        return NOT_MINE;
    leaf->nbytes = leaf->item * (uint64_t)batch->count;
    node->leaf = batch->num_leaves++;
    return 0;
}

static int add_number(Batch *batch, Node *node, int kind, int code)
{
    View view = {.code = code, .itemsize = 8, .ndim = 0};
    node->kind = kind;
    return add_leaf(batch, node, &view);
}

/* Whether torch makes another of this tuple's class by calling it with the fields. */
static int is_named_tuple(PyObject *sample)
{
    PyTypeObject *cls = Py_TYPE(sample);
    if (PyType_GetSlot(cls, Py_tp_iter) != PyType_GetSlot(&PyTuple_Type, Py_tp_iter) ||
        PyType_GetSlot(cls, Py_sq_length) != PyType_GetSlot(&PyTuple_Type, Py_sq_length))
        return 0; /* its items are not what it shows */
    PyObject *fields = PyObject_GetAttrString(sample, "_fields");
    if (fields == NULL) {
        PyErr_Clear();
        return 0;
    }
    Py_DECREF(fields);
    return 1;
}

static int scan(Batch *batch, PyObject *sample, PyObject *key, int depth);

static int scan_items(Batch *batch, Node *node, PyObject *sample, int depth)
{
    PyObject *key, *item;
    Py_ssize_t at = 0;
    int found = 0;
    if (node->kind == DICT) {
        while (!found && PyDict_Next(sample, &at, &key, &item)) {
            if (Py_TYPE(key) != &PyUnicode_Type && Py_TYPE(key) != &PyLong_Type)
                return NOT_MINE;
            Py_INCREF(key), Py_INCREF(item);
            found = scan(batch, item, key, depth + 1);
            Py_DECREF(key);
            Py_DECREF(item);
            node->count++;
        }
        return found || node->count ? found : NOT_MINE;
    }
    Py_ssize_t size = PyObject_Size(sample);
    if (size <= 0)
        return not_mine();
    for (; !found && at < size; at++) {
        item = node->kind == LIST ? PyList_GetItem(sample, at) : PyTuple_GetItem(sample, at);
        if (item == NULL)
            return not_mine();
        Py_INCREF(item);
        found = scan(batch, item, NULL, depth + 1);
        Py_DECREF(item);
        node->count++;
    }
    return found;
}

/* Adds the nodes of a sample, which the caller owns. */
static int scan(Batch *batch, PyObject *sample, PyObject *key, int depth)
{
    if (batch->num_nodes == MAX_NODES || depth == MAX_DEPTH)
        return NOT_MINE;
    Node *node = &batch->nodes[batch->num_nodes++];
    Py_XINCREF(key);
    *node = (Node){.key = key, .leaf = -1};
    PyTypeObject *cls = Py_TYPE(sample);
    int found;
    if (torch_is_tensor(sample)) {
        View view;
        node->kind = TENSOR;
        found = torch_look(sample, &view);
        if (!found)
            found = add_leaf(batch, node, &view);
    } else if (cls == &PyLong_Type)
        found = add_number(batch, node, INT, code_of_int);
    else if (cls == &PyFloat_Type)
        found = add_number(batch, node, FLOAT, code_of_float);
    else if (cls == &PyUnicode_Type || cls == &PyBytes_Type) {
        node->kind = STRINGS, batch->has_strings = true;
        node->strings = depth ? PyList_New(batch->count) : NULL;
        found = node->strings != NULL ? 0 : depth ? -1 : NOT_MINE; /* torch gives a list of strings as it is */
    } else if (cls == &PyTuple_Type || cls == &PyList_Type || cls == &PyDict_Type) {
        node->kind = cls == &PyTuple_Type ? TUPLE : cls == &PyList_Type ? LIST : DICT;
        found = scan_items(batch, node, sample, depth);
    } else if (PyTuple_Check(sample) && is_named_tuple(sample)) {
        node->kind = NAMED_TUPLE;
        Py_INCREF(cls);
        node->cls = (PyObject *)cls;
        found = scan_items(batch, node, sample, depth);
    } else
        found = NOT_MINE;
    node->end = batch->num_nodes;
    return found;
}

/* --- the values --- */

static int fill_tensor(const Leaf *leaf, PyObject *sample, Py_ssize_t row)
{
    View view;
    int found = torch_look_again(sample, leaf->view.code, &view);
    if (found)
        return found;
    size_t size = (size_t)view.ndim * sizeof(int64_t);
    if (view.code != leaf->view.code || view.ndim != leaf->view.ndim || memcmp(view.sizes, leaf->view.sizes, size) ||
        memcmp(view.strides, leaf->view.strides, size))
        return NOT_MINE;
    char *to = leaf->memory + (uint64_t)row * leaf->item;
    const void *from = (const void *)(uintptr_t)view.address;
    if (leaf->item < WITHOUT_GIL) {
        memcpy(to, from, leaf->item);
        return 0;
    }
    PyObject *alias = torch_detach(sample);
    if (alias == NULL)
        return -1;
    found = torch_look(alias, &view);
    from = (const void *)(uintptr_t)view.address;
    if (!found && view_span(&view) != leaf->item) /* another thread has resized it meanwhile */
        found = NOT_MINE;
    if (!found) {
        Py_BEGIN_ALLOW_THREADS
        memcpy(to, from, leaf->item);
        Py_END_ALLOW_THREADS
    }
    Py_DECREF(alias);
    return found;
}

static int fill(Batch *batch, int at, PyObject *sample, Py_ssize_t row);

static int fill_items(Batch *batch, int at, PyObject *sample, Py_ssize_t row)
{
    const Node *node = &batch->nodes[at];
    int child = at + 1, found = 0;
    if (node->kind == DICT) { /* it may have more items: torch takes those of the first sample */
        for (; !found && child < node->end; child = batch->nodes[child].end) {
            PyObject *item = PyDict_GetItemWithError(sample, batch->nodes[child].key);
            if (item == NULL)
                return not_mine();
            Py_INCREF(item);
            found = fill(batch, child, item, row);
            Py_DECREF(item);
        }
        return found;
    }
    if (PyObject_Size(sample) != node->count)
        return NOT_MINE;
    for (Py_ssize_t index = 0; !found && child < node->end; child = batch->nodes[child].end, index++) {
        PyObject *item = node->kind == LIST ? PyList_GetItem(sample, index) : PyTuple_GetItem(sample, index);
        if (item == NULL)
            return not_mine();
        Py_INCREF(item);
        found = fill(batch, child, item, row);
        Py_DECREF(item);
    }
    return found;
}

/* Copies the values of a sample, which the caller owns, to their places. */
static int fill(Batch *batch, int at, PyObject *sample, Py_ssize_t row)
{
    Node *node = &batch->nodes[at];
    PyTypeObject *cls = Py_TYPE(sample);
    int overflow = 0;
    long long integer;
    double number;
    switch (node->kind) {
    case TENSOR:
        return torch_is_tensor(sample) ? fill_tensor(&batch->leaves[node->leaf], sample, row) : NOT_MINE;
    case INT:
        if (cls != &PyLong_Type)
            return NOT_MINE;
        integer = PyLong_AsLongLongAndOverflow(sample, &overflow);
        if (overflow)
            return NOT_MINE;
        memcpy(batch->leaves[node->leaf].memory + 8 * row, &integer, 8);
        return 0;
    case FLOAT:
        if (cls != &PyFloat_Type)
            return NOT_MINE;
        number = PyFloat_AsDouble(sample);
        memcpy(batch->leaves[node->leaf].memory + 8 * row, &number, 8);
        return 0;
    case STRINGS: /* torch takes the others as they are */
        Py_INCREF(sample);
        return PyList_SetItem(node->strings, row, sample);
    case TUPLE:
        return cls == &PyTuple_Type ? fill_items(batch, at, sample, row) : NOT_MINE;
    case LIST:
        return cls == &PyList_Type ? fill_items(batch, at, sample, row) : NOT_MINE;
    case DICT:
        return cls == &PyDict_Type ? fill_items(batch, at, sample, row) : NOT_MINE;
    default:
        return (PyObject *)cls == node->cls ? fill_items(batch, at, sample, row) : NOT_MINE;
    }
}

static int fill_all(Batch *batch)
{
    int found = 0;
    for (Py_ssize_t row = 0; !found && row < batch->count; row++) {
        PyObject *sample = PyList_GetItem(batch->samples, row);
        if (sample == NULL || PyList_Size(batch->samples) != batch->count)
            return not_mine();
        Py_INCREF(sample);
        found = fill(batch, 0, sample, row);
        Py_DECREF(sample);
    }
    return found;
}

/* --- a batch of tensors --- */

/* (samples, *sizes) */
static PyObject *sizes_of(const Batch *batch, const View *view)
{
    PyObject *sizes = PyTuple_New(view->ndim + 1);
    for (int dim = 0; sizes != NULL && dim <= view->ndim; dim++) {
        PyObject *size = PyLong_FromLongLong(dim ? view->sizes[dim - 1] : batch->count);
        if (size == NULL || PyTuple_SetItem(sizes, dim, size) < 0)
            Py_CLEAR(sizes);
    }
    return sizes;
}

static int make_tensors(Batch *batch)
{
    for (int index = 0; index < batch->num_leaves; index++) {
        Leaf *leaf = &batch->leaves[index];
        PyObject *sizes = sizes_of(batch, &leaf->view);
        if (sizes == NULL)
            return -1;
        unsigned long long nbytes = leaf->nbytes;
        leaf->tensor = PyObject_CallFunction(new_tensor, "iOK", leaf->view.code, sizes, nbytes);
        Py_DECREF(sizes);
        if (leaf->tensor == NULL)
            return -1;
        View view;
        int found = torch_is_tensor(leaf->tensor) ? torch_look(leaf->tensor, &view) : NOT_MINE;
        if (found)
            return found;
        if (view.code != leaf->view.code || !is_as_new(&view) || view_span(&view) != leaf->nbytes)
            return NOT_MINE;
        leaf->memory = (char *)(uintptr_t)view.address;
    }
    return 0;
}

/* The collated value of a node: a new reference. `parent` is the kind of the collection that it is in. */
static PyObject *build(Batch *batch, int at, int parent)
{
    Node *node = &batch->nodes[at];
    if (node->kind == STRINGS) { /* torch hands on what it has made to take the samples apart */
        if (parent != DICT)
            return PyList_AsTuple(node->strings);
        Py_INCREF(node->strings);
        return node->strings;
    }
    if (node->leaf >= 0) {
        PyObject *tensor = batch->leaves[node->leaf].tensor;
        Py_INCREF(tensor);
        return tensor;
    }
    PyObject *result = node->kind == DICT          ? PyDict_New()
                       : node->kind == NAMED_TUPLE ? PyTuple_New(node->count)
                                                   : PyList_New(node->count);
    Py_ssize_t index = 0;
    for (int child = at + 1; result != NULL && child < node->end; child = batch->nodes[child].end, index++) {
        PyObject *value = build(batch, child, node->kind);
        int failed = value == NULL;
        if (failed)
            ;
        else if (node->kind == DICT) {
            failed = PyDict_SetItem(result, batch->nodes[child].key, value);
            Py_DECREF(value);
        } else
            failed = node->kind == NAMED_TUPLE ? PyTuple_SetItem(result, index, value)
                                               : PyList_SetItem(result, index, value);
        if (failed)
            Py_CLEAR(result);
    }
    if (result != NULL && node->kind == NAMED_TUPLE) {
        PyObject *made = PyObject_CallObject(node->cls, result);
        Py_DECREF(result);
        return made;
    }
    return result;
}

static int collate_tensors(Batch *batch, PyObject **result)
{
    int found = make_tensors(batch);
    if (!found)
        found = fill_all(batch);
    if (found)
        return found;
    *result = build(batch, 0, TENSOR);
    return *result == NULL ? -1 : 0;
}

/* --- a message --- */

/* Whether all nodes but the first are leaves, or it is one. Their leaves are then in the order of the nodes. */
static bool is_flat(const Batch *batch)
{
    const Node *root = batch->nodes;
    if (batch->has_strings || root->kind == NAMED_TUPLE || batch->num_nodes != batch->num_leaves + (root->leaf < 0))
        return false;
    if (root->kind == DICT)
        for (int index = 1; index < batch->num_nodes; index++)
            if (Py_TYPE(batch->nodes[index].key) != &PyUnicode_Type)
                return false;
    return true;
}

static uint64_t mix(uint64_t hash, uint64_t value)
{
    hash = (hash ^ value) * 0x9E3779B97F4A7C15u;
    return hash ^ hash >> 29;
}

static int root_kind(const Batch *batch)
{
    int kind = batch->nodes[0].kind;
    return kind == INT || kind == FLOAT ? TENSOR : kind == TUPLE ? LIST : kind;
}

static uint64_t hash_of(const Batch *batch)
{
    uint64_t hash = mix((uint64_t)batch->count, (uint64_t)root_kind(batch) << 8 | (uint64_t)batch->num_leaves);
    if (batch->nodes[0].kind == DICT)
        for (int index = 1; index < batch->num_nodes; index++)
            hash = mix(hash, (uint64_t)PyObject_Hash(batch->nodes[index].key)); /* of a str: never fails */
    for (int index = 0; index < batch->num_leaves; index++) {
        const View *view = &batch->leaves[index].view;
        hash = mix(hash, (uint64_t)view->code << 8 | (uint64_t)view->ndim);
        for (int dim = 0; dim < view->ndim; dim++)
            hash = mix(hash, (uint64_t)view->sizes[dim]);
    }
    return hash;
}

static bool is_for(const Layout *layout, const Batch *batch, uint64_t hash)
{
    if (layout->hash != hash || layout->samples != batch->count || layout->count != batch->num_leaves ||
        layout->kind != root_kind(batch))
        return false;
    for (int index = 0; index < layout->count; index++) {
        const View *own = &layout->views[index], *other = &batch->leaves[index].view;
        if (own->code != other->code || own->ndim != other->ndim ||
            memcmp(own->sizes, other->sizes, (size_t)own->ndim * sizeof(int64_t)))
            return false;
        if (layout->kind == DICT) {
            PyObject *key = PyTuple_GetItem(layout->keys, index);
            if (key != batch->nodes[index + 1].key && PyUnicode_Compare(key, batch->nodes[index + 1].key))
                return false;
        }
    }
    return true;
}

static void free_layout(Layout *layout)
{
    Py_XDECREF(layout->keys);
    Py_XDECREF(layout->prefix);
    PyMem_Free(layout->shifts);
    PyMem_Free(layout->views);
    PyMem_Free(layout);
}

static void clear_layouts(void)
{
    for (size_t at = 0; at < TABLE; at++) {
        Layout *layout = layouts[at];
        layouts[at] = NULL;
        if (layout != NULL)
            free_layout(layout);
    }
    num_layouts = 0;
}

/* Has the twin lay the batch out. */
static Layout *new_layout(const Batch *batch, uint64_t hash)
{
    PyObject *const cls = (PyObject *)(batch->nodes[0].kind == DICT ? &PyDict_Type : &PyList_Type);
    Py_ssize_t count = batch->num_leaves;
    Layout *layout = PyMem_Calloc(1, sizeof *layout);
    PyObject *geometries = PyTuple_New(count), *made = NULL, *shifts = NULL;
    if (layout == NULL || geometries == NULL)
        goto failed;
    layout->hash = hash, layout->samples = batch->count, layout->count = (int)count, layout->kind = root_kind(batch);
    layout->keys = PyTuple_New(layout->kind == DICT ? count : 0);
    layout->shifts = PyMem_Calloc((size_t)count, sizeof *layout->shifts);
    layout->views = PyMem_Calloc((size_t)count, sizeof *layout->views);
    if (layout->keys == NULL || layout->shifts == NULL || layout->views == NULL)
        goto failed;
    for (Py_ssize_t index = 0; index < count; index++) {
        const View *view = &batch->leaves[index].view;
        layout->views[index] = *view;
        PyObject *sizes = sizes_of(batch, view);
        PyObject *geometry = sizes == NULL ? NULL : Py_BuildValue("iN", view->code, sizes);
        if (geometry == NULL || PyTuple_SetItem(geometries, index, geometry) < 0)
            goto failed;
        if (layout->kind == DICT) {
            PyObject *key = batch->nodes[index + 1].key;
            Py_INCREF(key);
            if (PyTuple_SetItem(layout->keys, index, key) < 0)
                goto failed;
        }
    }
    PyObject *of_tensor = layout->kind == TENSOR ? Py_None : cls; /* None: the tensor alone */
    made = PyObject_CallFunctionObjArgs(lay_out, of_tensor, layout->keys, geometries, NULL);
    unsigned long long pack;
    if (made == NULL || !PyArg_ParseTuple(made, "SOK", &layout->prefix, &shifts, &pack)) {
        layout->prefix = NULL;
        goto failed;
    }
    Py_INCREF(layout->prefix);
    layout->pack = pack;
    for (Py_ssize_t index = 0; index < count; index++) {
        PyObject *shift = PySequence_GetItem(shifts, index);
        layout->shifts[index] = shift == NULL ? -1 : PyLong_AsLongLong(shift);
        Py_XDECREF(shift);
        if (PyErr_Occurred())
            goto failed;
        if (layout->shifts[index] >= 0 && ((uint64_t)layout->shifts[index] > pack ||
                                           batch->leaves[index].nbytes > pack - (uint64_t)layout->shifts[index])) {
            PyErr_SetString(PyExc_ValueError, "a slice ends behind its block");
            goto failed;
        }
    }
    Py_DECREF(made);
    Py_DECREF(geometries);
    return layout;
failed:
    if (!PyErr_Occurred())
        PyErr_NoMemory();
    Py_XDECREF(made);
    Py_XDECREF(geometries);
    if (layout != NULL)
        free_layout(layout);
    return NULL;
}

static Layout *layout_of(const Batch *batch)
{
    uint64_t hash = hash_of(batch);
    size_t at;
    for (at = hash % TABLE; layouts[at] != NULL; at = (at + 1) % TABLE)
        if (is_for(layouts[at], batch, hash))
            return layouts[at];
    Layout *layout = new_layout(batch, hash); /* may run other code, which may add one, too */
    if (layout == NULL)
        return NULL;
    if (num_layouts >= MAX_LAYOUTS)
        clear_layouts();
    for (at = hash % TABLE; layouts[at] != NULL; at = (at + 1) % TABLE)
        ;
    layouts[at] = layout;
    num_layouts++;
    return layout;
}

/* The blocks of a message, with references to them and to their storages, which keep them in use. */
typedef struct {
    int count;
    Block *blocks[MAX_LEAVES + 1];
    PyObject *storages[MAX_LEAVES + 1];
} Blocks;

static void drop_blocks(Blocks *blocks)
{
    while (blocks->count) {
        blocks->count--;
        Py_DECREF(blocks->storages[blocks->count]);
        Py_DECREF(blocks->blocks[blocks->count]);
    }
}

/* Takes a block of so many bytes out of the pool, which nothing else uses. */
static int take_block(Blocks *blocks, uint64_t nbytes)
{
    Block *block = NULL;
    PyObject *storage = NULL;
    if (memory_lock(0) < 0)
        return -1;
    block = pool_take_free(nbytes, &storage);
    memory_unlock();
    if (block == NULL) {
        if (PyErr_Occurred())
            return -1;
        PyObject *made = PyObject_CallFunction(reserve, "K", (unsigned long long)nbytes);
        if (made == NULL)
            return -1;
        if (made == Py_None || !PyArg_ParseTuple(made, "OO", &block, &storage) ||
            !PyObject_TypeCheck((PyObject *)block, Block_Type) || block->nbytes != nbytes) {
            Py_DECREF(made);
            return PyErr_Occurred() ? -1 : NOT_MINE; /* no descriptor is free */
        }
        Py_INCREF(block);
        Py_INCREF(storage);
        Py_DECREF(made);
    }
    blocks->blocks[blocks->count] = block, blocks->storages[blocks->count++] = storage;
    if (block->number == UNTRACKED) {
        PyObject *result = PyObject_CallFunctionObjArgs(prepare_to_send, (PyObject *)block, NULL);
        Py_XDECREF(result);
        return result == NULL ? -1 : 0;
    }
    return 0;
}

/* Takes the blocks of the layout, those with one tensor first, and gives each leaf its place. */
static int take_blocks(Batch *batch, const int64_t *shifts, uint64_t pack, Blocks *blocks)
{
    int found = 0;
    for (int index = 0; !found && index < batch->num_leaves; index++)
        if (shifts[index] < 0) {
            found = take_block(blocks, batch->leaves[index].nbytes);
            if (!found)
                batch->leaves[index].memory = (char *)(uintptr_t)blocks->blocks[blocks->count - 1]->address;
        }
    if (found || !pack)
        return found;
    found = take_block(blocks, pack);
    for (int index = 0; !found && index < batch->num_leaves; index++)
        if (shifts[index] >= 0)
            batch->leaves[index].memory =
                (char *)(uintptr_t)blocks->blocks[blocks->count - 1]->address + shifts[index];
    return found;
}

static PyObject *message_of(PyObject *prefix, const Blocks *blocks, bool is_packed)
{
    Py_ssize_t size = PyBytes_Size(prefix), count = blocks->count;
    PyObject *data = PyBytes_FromStringAndSize(NULL, size + count * REFERENCE_SIZE + COUNT_SIZE), *result = NULL;
    PyObject *fds = PyTuple_New(count), *numbers = PyTuple_New(count), *keep = PyTuple_New(count);
    if (data == NULL || fds == NULL || numbers == NULL || keep == NULL)
        goto done;
    char *at = PyBytes_AsString(data);
    memcpy(at, PyBytes_AsString(prefix), (size_t)size);
    at += size;
    uint64_t nbytes = 0;
    for (Py_ssize_t index = 0; index < count; index++, at += REFERENCE_SIZE) {
        const Block *block = blocks->blocks[index];
        memcpy(at, &block->number, 8);
        memcpy(at + 8, &block->nbytes, 8);
        nbytes += block->nbytes;
        PyObject *fd = PyLong_FromLong(block->fd), *number = PyLong_FromUnsignedLongLong(block->number);
        if (fd == NULL || number == NULL) {
            Py_XDECREF(fd);
            Py_XDECREF(number);
            goto done;
        }
        Py_INCREF(blocks->storages[index]);
        PyTuple_SetItem(fds, index, fd);
        PyTuple_SetItem(numbers, index, number);
        PyTuple_SetItem(keep, index, blocks->storages[index]);
    }
    uint32_t references = (uint32_t)count | (is_packed ? PACKED : 0);
    memcpy(at, &references, COUNT_SIZE);
    result = message_new(data, fds, keep, numbers, nbytes);
done:
    Py_XDECREF(data);
    Py_XDECREF(fds);
    Py_XDECREF(numbers);
    Py_XDECREF(keep);
    return result;
}

static int collate_message(Batch *batch, Py_ssize_t limit, PyObject **result)
{
    Layout *layout = layout_of(batch);
    if (layout == NULL)
        return -1;
    if (PyBytes_Size(layout->prefix) + (layout->count + 1) * REFERENCE_SIZE + COUNT_SIZE > limit)
        return NOT_MINE;
    PyObject *prefix = layout->prefix;
    Py_INCREF(prefix);
    uint64_t pack = layout->pack;
    int64_t shifts[MAX_LEAVES]; /* code that runs meanwhile may have the layout freed */
    memcpy(shifts, layout->shifts, (size_t)layout->count * sizeof *shifts);
    Blocks blocks = {.count = 0};
    int found = take_blocks(batch, shifts, pack, &blocks);
    if (!found)
        found = fill_all(batch);
    if (!found) {
        *result = message_of(prefix, &blocks, pack > 0);
        found = *result == NULL ? -1 : 0;
    }
    drop_blocks(&blocks);
    Py_DECREF(prefix);
    return found;
}

/* --- whether torch would do the same --- */

/* Whether the user has not changed torch's map of functions. */
static bool has_known_map(void)
{
    PyObject *key, *value, *known_key, *known_value;
    Py_ssize_t at = 0, known_at = 0;
    if (PyDict_Size(function_map) != PyDict_Size(known_map))
        return false;
    while (PyDict_Next(known_map, &known_at, &known_key, &known_value))
        if (!PyDict_Next(function_map, &at, &key, &value) || key != known_key || value != known_value)
            return false;
    return true;
}

/* Whether a mode is active, such as that of torch.set_default_device: 1, 0, or -1 with an exception. */
static int is_empty(PyObject *count_modes)
{
    PyObject *count = PyObject_CallFunctionObjArgs(count_modes, NULL);
    if (count == NULL)
        return -1;
    long modes = PyLong_AsLong(count);
    Py_DECREF(count);
    return modes == 0 ? 1 : PyErr_Occurred() ? -1 : 0;
}

/* collate(samples, limit): the batch; or, with `limit` > 0, a message of at most so many bytes with a flat batch, and
 * the batch if it is not flat. None if it is the twin's. */
static PyObject *collate(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    (void)module;
    if (count != 2) {
        PyErr_SetString(PyExc_TypeError, "collate() takes samples and the limit");
        return NULL;
    }
    Py_ssize_t limit = PyLong_AsSsize_t(args[1]);
    if (limit == -1 && PyErr_Occurred())
        return NULL;
    if (!torch_ready || function_map == NULL || Py_TYPE(args[0]) != &PyList_Type || PyList_Size(args[0]) < 1 ||
        !has_known_map())
        Py_RETURN_NONE;
    int found = is_empty(function_modes);
    if (found == 1)
        found = is_empty(dispatch_modes);
    if (found != 1)
        return found < 0 ? NULL : (Py_INCREF(Py_None), Py_None);
    Batch batch;
    batch.samples = args[0], batch.count = PyList_Size(args[0]);
    batch.num_nodes = batch.num_leaves = 0, batch.has_strings = false;
    PyObject *first = PyList_GetItem(args[0], 0), *result = NULL;
    if (first == NULL) { /* it has been emptied meanwhile */
        PyErr_Clear();
        Py_RETURN_NONE;
    }
    Py_INCREF(first);
    found = scan(&batch, first, NULL, 0);
    Py_DECREF(first);
    if (!found && limit > 0 && memory_ready() && is_flat(&batch))
        found = collate_message(&batch, limit, &result);
    else if (!found)
        found = collate_tensors(&batch, &result);
    drop_batch(&batch);
    if (found == NOT_MINE)
        Py_RETURN_NONE;
    return result;
}

/* set_collate(map, known, modes, codes, functions): from now on `collate` works while `map`, torch's map of functions,
 * is as `known`.
 *
 * `modes`: two functions that count the active modes. `codes`: those of int64 and float64. `functions`:
 *     new_tensor(code, size, nbytes): a new tensor of the batch.
 *     reserve(nbytes): a block of the pool, and its storage; None if there is no descriptor for it.
 *     prepare_to_send(block): gives the block a number.
 *     lay_out(cls, keys, [(code, size), ...]): how a message has these tensors; `cls` is None for a tensor alone.
 *         Returns the first bytes of the message; where each tensor begins in the last block, -1 for one with a block
 *         of its own; and the bytes of that last block, 0 if there is none. */
static PyObject *set_collate(PyObject *module, PyObject *args)
{
    (void)module;
    PyObject *objects[8];
    int codes[2];
    if (!PyArg_ParseTuple(args, "O!O!(OO)(ii)(OOOO)", &PyDict_Type, &objects[0], &PyDict_Type, &objects[1], &objects[2],
                          &objects[3], &codes[0], &codes[1], &objects[4], &objects[5], &objects[6], &objects[7]))
        return NULL;
    PyObject **places[] = {&function_map, &known_map, &function_modes, &dispatch_modes,
                           &new_tensor,   &reserve,   &prepare_to_send, &lay_out};
    for (size_t index = 0; index < sizeof places / sizeof *places; index++) {
        PyObject *old = *places[index];
        Py_INCREF(objects[index]);
        *places[index] = objects[index];
        Py_XDECREF(old);
    }
    code_of_int = codes[0], code_of_float = codes[1];
    Py_RETURN_NONE;
}

static PyMethodDef functions[] = {
    {"collate", (PyCFunction)(void (*)(void))collate, METH_FASTCALL, NULL},
    {"set_collate", set_collate, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};

int add_collate(PyObject *module)
{
    return add_functions(module, functions);
}
