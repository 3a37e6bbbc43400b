/* Looks at tensors, and makes them of prototypes, by what memory/storages.py finds in this torch.
 *
 * torch shows a tensor through its DLPack exchange table, which costs a tenth of asking for its attributes. The table
 * is used to look, never to make: tensors that DLPack makes have lost their storage (DLPack's C exchange interface,
 * version 1.2 and later of the standard, describes the two structures below).
 */

#include "core.h"

#include <string.h>

/* The part of DLPack that is used here. */

enum { DL_CPU = 1, DL_INT = 0, DL_UINT = 1, DL_FLOAT = 2, DL_BFLOAT = 4, DL_COMPLEX = 5, DL_BOOL = 6, DL_CODES = 32 };

typedef struct {
    void *data;
    struct {
        int32_t type;
        int32_t id;
    } device;
    int32_t ndim;
    struct {
        uint8_t code;
        uint8_t bits;
        uint16_t lanes;
    } dtype;
    int64_t *shape;
    int64_t *strides; /* in elements */
    uint64_t byte_offset;
} Shown;

typedef struct {
    struct {
        uint32_t major;
        uint32_t minor;
    } version;
    void *older;
    void *allocate;
    void *from_object;
    void *to_object;
    int (*show)(void *object, Shown *out);
    void *current_stream;
} ExchangeTable;

#define DLPACK_MAJOR 1
#define TABLE_NAME "dlpack_exchange_api"

bool torch_ready;

static ExchangeTable *table;
static PyTypeObject *tensor_type;
static PyCFunction detach, is_neg; /* methods without arguments */
static PyObject *use_count, *requires_grad;
static descrgetfunc get_requires_grad; /* of the property */
/* By DLPack's code and bits: the code of the dtype, and its bytes; -1 if it is not known. */
static int dtype_codes[DL_CODES][256];
#define MAX_CODES 256
static bool are_integers[MAX_CODES]; /* by the code of the dtype */

bool torch_is_tensor(PyObject *obj)
{
    return Py_TYPE(obj) == tensor_type;
}

bool torch_is_class(PyObject *cls)
{
    return cls == (PyObject *)tensor_type;
}

static bool show(PyObject *tensor, Shown *shown)
{
    if (table->show(tensor, shown) == 0)
        return true;
    PyErr_Clear(); /* sparse, nested, on another device: the twin knows what to do */
    return false;
}

/* DLPack does not tell whether a tensor requires grad or has the neg bit. Both exist for floating dtypes only: the bit
 * is that of the imaginary part of a conjugate. */

static int check_grad(PyObject *tensor)
{
    PyObject *grad = get_requires_grad(requires_grad, tensor, (PyObject *)tensor_type);
    if (grad == NULL)
        return -1;
    Py_DECREF(grad); /* a bool, which lives on */
    return grad == Py_False ? 0 : NOT_MINE;
}

static int check_neg(PyObject *tensor) /* lets other threads run */
{
    PyObject *negative = is_neg(tensor, NULL);
    if (negative == NULL)
        return -1;
    Py_DECREF(negative);
    return negative == Py_False ? 0 : NOT_MINE;
}

static bool has_integers(const Shown *shown)
{
    return shown->dtype.code == DL_INT || shown->dtype.code == DL_UINT || shown->dtype.code == DL_BOOL;
}

static int view_of(const Shown *shown, View *view)
{
    if (shown->device.type != DL_CPU || shown->dtype.lanes != 1 || shown->dtype.code >= DL_CODES || shown->ndim < 0 ||
        shown->ndim > MAX_DIMS || (shown->ndim && (shown->shape == NULL || shown->strides == NULL)))
        return NOT_MINE;
    int code = dtype_codes[shown->dtype.code][shown->dtype.bits];
    if (code < 0 || shown->data == NULL)
        return NOT_MINE;
    view->address = (uint64_t)(uintptr_t)shown->data + shown->byte_offset;
    view->code = code;
    view->itemsize = shown->dtype.bits / 8;
    view->ndim = shown->ndim;
    if (shown->ndim) {
        memcpy(view->sizes, shown->shape, (size_t)shown->ndim * sizeof(int64_t));
        memcpy(view->strides, shown->strides, (size_t)shown->ndim * sizeof(int64_t));
    }
    return 0;
}

static int check_bits(PyObject *tensor)
{
    int found = check_grad(tensor);
    return found ? found : check_neg(tensor);
}

int torch_look(PyObject *tensor, View *view)
{
    Shown shown;
    if (!show(tensor, &shown))
        return NOT_MINE;
    if (!has_integers(&shown)) {
        int found = check_bits(tensor);
        if (found)
            return found;
        if (!show(tensor, &shown)) /* again: its address may be another one now */
            return NOT_MINE;
    }
    return view_of(&shown, view);
}

int torch_look_again(PyObject *tensor, int code, View *view)
{
    Shown shown;
    bool integers = code >= 0 && code < MAX_CODES && are_integers[code];
    int found = integers ? 0 : check_bits(tensor);
    if (found)
        return found;
    if (!show(tensor, &shown) || (integers && !has_integers(&shown)))
        return NOT_MINE;
    return view_of(&shown, view);
}

bool torch_is_at(PyObject *tensor, uint64_t address)
{
    Shown shown;
    return show(tensor, &shown) && (uint64_t)(uintptr_t)shown.data + shown.byte_offset == address;
}

uint64_t view_span(const View *view)
{
    uint64_t elements = 1;
    for (int dim = 0; dim < view->ndim; dim++) {
        uint64_t added;
        if (view->sizes[dim] <= 0 || view->strides[dim] < 0)
            return 0;
        if (__builtin_mul_overflow((uint64_t)view->sizes[dim] - 1, (uint64_t)view->strides[dim], &added) ||
            __builtin_add_overflow(elements, added, &elements))
            return 0;
    }
    uint64_t bytes;
    return __builtin_mul_overflow(elements, (uint64_t)view->itemsize, &bytes) ? 0 : bytes;
}

PyObject *torch_detach(PyObject *tensor)
{
    return detach(tensor, NULL);
}

long call_for_number(PyObject *function, PyObject *argument)
{
    PyObject *result = PyObject_CallFunctionObjArgs(function, argument, NULL);
    if (result == NULL)
        return -1;
    long number = PyLong_AsLong(result);
    Py_DECREF(result);
    return number;
}

long torch_use_count(PyObject *cdata)
{
    return call_for_number(use_count, cdata);
}

/* The function of a method without arguments; NULL if it is another one. */
static PyCFunction without_arguments(PyObject *method)
{
    bool has_none = PyCFunction_Check(method) && PyCFunction_GetFlags(method) == METH_NOARGS;
    return has_none ? PyCFunction_GetFunction(method) : NULL;
}

/* set_torch(Tensor, detach, is_neg, requires_grad, use_count, table): use these. `detach` and `is_neg` are methods of some
 * tensor, whose functions are called without a detour. False if there is no table, or another one: then only `use_count`
 * is used. */
static PyObject *set_torch(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    (void)module;
    if (count != 6 || !PyType_Check(args[0])) {
        PyErr_SetString(PyExc_TypeError, "set_torch() takes a class, four of its functions, and the table");
        return NULL;
    }
    Py_INCREF(args[4]); /* this and the others for as long as the process lives */
    use_count = args[4];
    if (!PyCapsule_IsValid(args[5], TABLE_NAME))
        Py_RETURN_FALSE;
    ExchangeTable *found = PyCapsule_GetPointer(args[5], TABLE_NAME);
    if (found == NULL)
        return NULL;
    descrgetfunc get = (descrgetfunc)PyType_GetSlot(Py_TYPE(args[3]), Py_tp_descr_get);
    detach = without_arguments(args[1]), is_neg = without_arguments(args[2]);
    if (found->version.major != DLPACK_MAJOR || found->show == NULL || get == NULL || detach == NULL || is_neg == NULL)
        Py_RETURN_FALSE;
    for (Py_ssize_t index = 0; index < 4; index++)
        Py_INCREF(args[index]);
    tensor_type = (PyTypeObject *)args[0];
    requires_grad = args[3];
    get_requires_grad = get;
    table = found;
    for (int code = 0; code < DL_CODES; code++)
        for (int bits = 0; bits < 256; bits++)
            dtype_codes[code][bits] = -1;
    Py_RETURN_TRUE;
}

/* learn_dtype(tensor, code): the dtype of this tensor has this code. A dtype that DLPack does not tell from another one
 * is not known, and complex ones are not, because DLPack does not show conj views. */
static PyObject *learn_dtype(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    (void)module;
    Shown shown;
    if (count != 2 || table == NULL) {
        PyErr_SetString(PyExc_TypeError, "learn_dtype() takes a tensor and a code, after set_torch()");
        return NULL;
    }
    long code = PyLong_AsLong(args[1]);
    if (code == -1 && PyErr_Occurred())
        return NULL;
    if (!show(args[0], &shown) || shown.dtype.lanes != 1 || shown.dtype.code >= DL_CODES || shown.dtype.bits % 8 ||
        shown.dtype.code == DL_COMPLEX)
        Py_RETURN_FALSE;
    int *known = &dtype_codes[shown.dtype.code][shown.dtype.bits];
    if (*known != -1) {
        *known = -2;
        Py_RETURN_FALSE;
    }
    *known = (int)code;
    if (code >= 0 && code < MAX_CODES)
        are_integers[code] = has_integers(&shown);
    torch_ready = true;
    Py_RETURN_TRUE;
}

/* look(tensor): its address, and its geometry without the offset; None if it is not plain. For tests. */
static PyObject *look(PyObject *module, PyObject *tensor)
{
    (void)module;
    View view;
    if (!torch_ready || !torch_is_tensor(tensor))
        Py_RETURN_NONE;
    int found = torch_look(tensor, &view);
    if (found)
        return found < 0 ? NULL : (Py_INCREF(Py_None), Py_None);
    PyObject *sizes = PyTuple_New(view.ndim), *strides = PyTuple_New(view.ndim);
    for (int dim = 0; sizes != NULL && strides != NULL && dim < view.ndim; dim++) {
        PyTuple_SetItem(sizes, dim, PyLong_FromLongLong(view.sizes[dim]));
        PyTuple_SetItem(strides, dim, PyLong_FromLongLong(view.strides[dim]));
    }
    return Py_BuildValue("KiKNN", (unsigned long long)view.address, view.code, (unsigned long long)view_span(&view), sizes,
                         strides);
}

static PyMethodDef functions[] = {
    {"set_torch", (PyCFunction)(void (*)(void))set_torch, METH_FASTCALL, NULL},
    {"learn_dtype", (PyCFunction)(void (*)(void))learn_dtype, METH_FASTCALL, NULL},
    {"look", look, METH_O, NULL},
    {NULL, NULL, 0, NULL},
};

int add_torch(PyObject *module)
{
    return add_functions(module, functions);
}
