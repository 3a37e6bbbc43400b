/* The module torchwq._native._core. Each file of this room adds its types and functions. */

#include "core.h"

int add_functions(PyObject *module, PyMethodDef *methods)
{
    return PyModule_AddFunctions(module, methods);
}

PyTypeObject *add_type(PyObject *module, PyType_Spec *spec)
{
    PyObject *type = PyType_FromModuleAndSpec(module, spec, NULL);
    if (type == NULL)
        return NULL;
    if (PyModule_AddType(module, (PyTypeObject *)type) < 0) {
        Py_DECREF(type);
        return NULL;
    }
    return (PyTypeObject *)type; /* this reference lives as long as the process */
}

void free_object(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    freefunc free_it = (freefunc)PyType_GetSlot(type, Py_tp_free);
    free_it(self);
    Py_DECREF(type);
}

/* What sources.py makes of the sources; setup.py defines it. */
#ifndef SOURCES
#define SOURCES ""
#endif

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "torchwq._native._core",
    .m_doc = "The hot path in C. See the package for what chooses between this and the twins in Python.",
    .m_size = -1, /* one per process: torch has none per interpreter either */
};

PyMODINIT_FUNC PyInit__core(void)
{
    PyObject *module = PyModule_Create(&definition);
    if (module == NULL)
        return NULL;
    if (PyModule_AddStringConstant(module, "sources", SOURCES) < 0 || add_lock(module) < 0 ||
        add_sockets(module) < 0 || add_counts(module) < 0 || add_block(module) < 0 ||
        add_torch(module) < 0 || add_poller(module) < 0 || add_memory(module) < 0 || add_message(module) < 0 ||
        add_move(module) < 0 || add_outbox(module) < 0 || add_receive(module) < 0 || add_plain(module) < 0 ||
        add_collate(module) < 0 || add_channel(module) < 0) {
        Py_DECREF(module);
        return NULL;
    }
    return module;
}
