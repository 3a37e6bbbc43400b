/* The fields of a block, and whether anything in this process uses it. Its twin: memory/block_fields.py.
 *
 * memory.block.Block is a class in Python, for all that is rare. It derives from this type, so that C code reads and
 * writes its fields where they are.
 */

#include "core.h"

PyTypeObject *Block_Type;

/* How many owners and references the storage of an idle block has: see `calibrate`. */
static long idle_owners = -1;
static long idle_references, idle_references_with_tensor;
static PyObject *storages_name, *keys_name;

/* The low half: since 3.14 the upper one has flags. */
long reference_count(PyObject *object)
{
    return (long)(uint32_t)object->ob_refcnt;
}

/* Whether anything but its prototype is on one of the slices: 1, 0, or -1 with an exception. */
static int slices_in_use(PyObject *sliced)
{
    PyObject *storages = PyObject_GetAttr(sliced, storages_name), *keys = PyObject_GetAttr(sliced, keys_name);
    int used = storages == NULL || keys == NULL ? -1 : 0;
    for (Py_ssize_t index = 0; !used && index < PyList_Size(storages); index++) {
        PyObject *storage = PyList_GetItem(storages, index), *key = PyList_GetItem(keys, index);
        long owners = storage == NULL || key == NULL ? -1 : torch_use_count(key);
        used = owners < 0 ? -1 : owners > idle_owners + 1 || reference_count(storage) > idle_references_with_tensor;
        if (!used) { /* see `block_in_use` */
            owners = torch_use_count(key);
            used = owners < 0 ? -1 : owners > idle_owners + 1;
        }
    }
    Py_XDECREF(storages);
    Py_XDECREF(keys);
    return used;
}

int block_in_use(Block *self)
{
    if (self->users)
        return 1;
    if (self->storage == NULL || self->storage == Py_None || self->cdata == NULL || idle_owners < 0) {
        PyErr_SetString(PyExc_RuntimeError, "this block keeps no storage");
        return -1;
    }
    PyObject *sliced = self->slice_prototypes;
    if (sliced != NULL && sliced != Py_None) {
        Py_INCREF(sliced);
        int used = slices_in_use(sliced);
        Py_DECREF(sliced);
        if (used)
            return used;
    }
    bool has_slices = self->slice_prototypes != NULL && self->slice_prototypes != Py_None;
    bool with_tensor = self->num_prototypes > 0 || has_slices;
    long most_owners = idle_owners + self->num_prototypes + has_slices;
    long most_references = with_tensor ? idle_references_with_tensor : idle_references;
    long owners = torch_use_count(self->cdata);
    if (owners < 0)
        return -1;
    if (owners > most_owners || reference_count(self->storage) > most_references)
        return 1;
    /* A thread may have turned its last reference into a tensor between the two counts. */
    owners = torch_use_count(self->cdata);
    return owners < 0 ? -1 : owners > most_owners;
}

PyObject *block_prototype(Block *self, PyObject *geometry)
{
    for (int index = 0; index < self->num_prototypes; index++)
        if (self->prototypes[index].geometry == geometry)
            return self->prototypes[index].tensor;
    for (int index = 0; index < self->num_prototypes; index++) {
        int equal = PyObject_RichCompareBool(self->prototypes[index].geometry, geometry, Py_EQ);
        if (equal < 0)
            PyErr_Clear();
        else if (equal)
            return self->prototypes[index].tensor;
    }
    return NULL;
}

static void drop_prototype(Block *self, int index)
{
    Prototype gone = self->prototypes[index];
    self->num_prototypes--;
    for (int at = index; at < self->num_prototypes; at++)
        self->prototypes[at] = self->prototypes[at + 1];
    Py_DECREF(gone.geometry);
    Py_DECREF(gone.tensor);
}

static int block_traverse(PyObject *op, visitproc visit, void *arg)
{
    Block *self = (Block *)op;
    Py_VISIT(Py_TYPE(op));
    Py_VISIT(self->storage);
    Py_VISIT(self->cdata);
    Py_VISIT(self->slice_prototypes);
    Py_VISIT(self->left_memory);
    for (int index = 0; index < self->num_prototypes; index++) {
        Py_VISIT(self->prototypes[index].geometry);
        Py_VISIT(self->prototypes[index].tensor);
    }
    return 0;
}

static int block_clear(PyObject *op)
{
    Block *self = (Block *)op;
    while (self->num_prototypes)
        drop_prototype(self, self->num_prototypes - 1);
    Py_CLEAR(self->slice_prototypes);
    Py_CLEAR(self->left_memory);
    Py_CLEAR(self->storage);
    Py_CLEAR(self->cdata);
    return 0;
}

static void block_dealloc(PyObject *op)
{
    PyObject_GC_UnTrack(op);
    block_clear(op);
    free_object(op);
}

bool is_block(PyObject *object)
{
    if (PyObject_TypeCheck(object, Block_Type))
        return true;
    PyErr_SetString(PyExc_TypeError, "a block was expected");
    return false;
}

static PyObject *find_prototype(PyObject *self, PyObject *geometry)
{
    PyObject *found = block_prototype((Block *)self, geometry);
    found = found == NULL ? Py_None : found;
    Py_INCREF(found);
    return found;
}

static PyObject *add_prototype(PyObject *op, PyObject *const *args, Py_ssize_t count)
{
    Block *self = (Block *)op;
    if (count != 2) {
        PyErr_SetString(PyExc_TypeError, "add_prototype() takes the geometry and the tensor");
        return NULL;
    }
    if (self->num_prototypes == MAX_PROTOTYPES)
        drop_prototype(self, 0);
    if (self->num_prototypes == MAX_PROTOTYPES) { /* what was dropped has added one meanwhile */
        PyErr_SetString(PyExc_RuntimeError, "too many prototypes");
        return NULL;
    }
    Prototype *made = &self->prototypes[self->num_prototypes++];
    Py_INCREF(args[0]), Py_INCREF(args[1]);
    made->geometry = args[0], made->tensor = args[1];
    Py_RETURN_NONE;
}

static PyObject *clear_prototypes(PyObject *op, PyObject *unused)
{
    (void)unused;
    Block *self = (Block *)op;
    while (self->num_prototypes)
        drop_prototype(self, self->num_prototypes - 1);
    Py_RETURN_NONE;
}

static PyObject *in_use(PyObject *self, PyObject *unused)
{
    (void)unused;
    int used = block_in_use((Block *)self);
    return used < 0 ? NULL : PyBool_FromLong(used);
}

/* calibrate(block, with_tensor): learn the counts of this block, which nothing but itself uses. */
static PyObject *calibrate(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    (void)module;
    if (count != 2 || !PyObject_TypeCheck(args[0], Block_Type) || ((Block *)args[0])->storage == NULL) {
        PyErr_SetString(PyExc_TypeError, "calibrate() takes a block with a storage, and whether it has a tensor");
        return NULL;
    }
    Block *block = (Block *)args[0];
    if (args[1] == Py_True) {
        idle_references_with_tensor = reference_count(block->storage);
        Py_RETURN_NONE;
    }
    idle_references = reference_count(block->storage);
    long owners = torch_use_count(block->cdata);
    if (owners < 0)
        return NULL;
    idle_owners = owners;
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"find_prototype", find_prototype, METH_O, NULL},
    {"add_prototype", (PyCFunction)(void (*)(void))add_prototype, METH_FASTCALL, NULL},
    {"clear_prototypes", clear_prototypes, METH_NOARGS, NULL},
    {"in_use", in_use, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef members[] = {
    {"kind", T_INT, offsetof(Block, kind), 0, NULL},
    {"fd", T_INT, offsetof(Block, fd), 0, NULL},
    {"users", T_INT, offsetof(Block, users), 0, NULL},
    {"is_polled", T_BOOL, offsetof(Block, is_polled), 0, NULL},
    {"is_listed_idle", T_BOOL, offsetof(Block, is_listed_idle), 0, NULL},
    {"is_orphaned", T_BOOL, offsetof(Block, is_orphaned), 0, NULL},
    {"has_content", T_BOOL, offsetof(Block, has_content), 0, NULL},
    {"number", T_ULONGLONG, offsetof(Block, number), 0, NULL},
    {"nbytes", T_ULONGLONG, offsetof(Block, nbytes), 0, NULL},
    {"address", T_ULONGLONG, offsetof(Block, address), 0, NULL},
    {"used_at", T_DOUBLE, offsetof(Block, used_at), 0, NULL},
    {"expires_at", T_DOUBLE, offsetof(Block, expires_at), 0, NULL},
    {"kept_storage", T_OBJECT, offsetof(Block, storage), 0, NULL},
    {"cdata", T_OBJECT, offsetof(Block, cdata), 0, NULL},
    {"slice_prototypes", T_OBJECT, offsetof(Block, slice_prototypes), 0, NULL},
    {"left_memory", T_OBJECT, offsetof(Block, left_memory), 0, NULL},
    {"num_prototypes", T_INT, offsetof(Block, num_prototypes), READONLY, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_dealloc, block_dealloc},
    {Py_tp_traverse, block_traverse},
    {Py_tp_clear, block_clear},
    {Py_tp_methods, methods},
    {Py_tp_members, members},
    {0, NULL},
};

static PyType_Spec spec = {
    .name = "torchwq._native._core.BlockFields",
    .basicsize = sizeof(Block),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_BASETYPE,
    .slots = slots,
};

static PyMethodDef functions[] = {
    {"calibrate", (PyCFunction)(void (*)(void))calibrate, METH_FASTCALL, NULL},
    {NULL, NULL, 0, NULL},
};

int add_block(PyObject *module)
{
    Block_Type = add_type(module, &spec);
    storages_name = PyUnicode_InternFromString("storages"), keys_name = PyUnicode_InternFromString("keys");
    return Block_Type == NULL || storages_name == NULL || keys_name == NULL ? -1 : add_functions(module, functions);
}
