/* How Python calls the pool's kernels: an extension module with one function for each, made by shm/build.py.
 *
 * A function checks its arguments as numba does (kind, dimensions, contiguous, writable), puts addresses, lengths and
 * scalars into a row of 64-bit words, gives the GIL back and calls. kernels.h has one line for each kernel:
 *
 *   KERNEL(name, arguments, result)
 *
 * `arguments`, one letter each, are those of numpy: arrays q int64, b int8, i int32, ? bool, all of one dimension, and K
 * int64 of two; scalars n, an integer, and t, a truth. `result`: v nothing, n one integer, 2 two of them.
 *
 * kernels.h also has two hashes: KVPLUG_SOURCES, of the Python sources, without which no library is used, and
 * KVPLUG_CALLER, of this file, by which a build knows that it is made already.
 *
 * Nothing here depends on the version of Python or numpy: the stable interface of 3.10, and numpy's from 1.25 on.
 */

#define Py_LIMITED_API 0x030A0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#define NPY_NO_DEPRECATED_API NPY_1_25_API_VERSION
#define NPY_TARGET_VERSION NPY_1_25_API_VERSION
#include <numpy/arrayobject.h>

#include <stdint.h>

#define MAX_ARGUMENTS 24
#define WORDS_AN_ARRAY 3

/* 0, or 1 if the kernel raised; what it answers is in `out`. */
typedef int64_t (*Section)(const int64_t *words, int64_t *out);

typedef struct {
    const char *name, *arguments;
    char result;
    Section section;
} Kernel;

#define KERNEL(name, arguments, result) extern int64_t kvplug_##name(const int64_t *, int64_t *);
#include "kernels.h"
#undef KERNEL

#define KERNEL(name, arguments, result) {#name, arguments, result, kvplug_##name},
static const Kernel kernels[] = {
#include "kernels.h"
};
#undef KERNEL

#define N_KERNELS (sizeof kernels / sizeof *kernels)
static PyMethodDef methods[N_KERNELS];

static int is_kind(const PyArrayObject *array, char kind) {
    switch (PyArray_TYPE(array)) {
    case NPY_LONG:
    case NPY_LONGLONG: return kind == 'q' || kind == 'K';
    case NPY_BYTE: return kind == 'b';
    case NPY_INT: return kind == 'i';
    case NPY_BOOL: return kind == '?';
    default: return 0;
    }
}

/* Number of words written to `at`, or -1 with an error set. */
static int put(const Kernel *kernel, Py_ssize_t i, PyObject *given, int64_t *at) {
    char kind = kernel->arguments[i];
    if (kind == 'n') {
        at[0] = PyLong_Check(given) ? PyLong_AsLongLong(given) : 0;
        if (!PyLong_Check(given)) {
            PyObject *index = PyNumber_Index(given);
            if (index == NULL) return -1;
            at[0] = PyLong_AsLongLong(index);
            Py_DECREF(index);
        }
        return at[0] == -1 && PyErr_Occurred() ? -1 : 1;
    }
    if (kind == 't') {
        int truth = PyObject_IsTrue(given);
        at[0] = truth;
        return truth < 0 ? -1 : 1;
    }
    PyArrayObject *array = (PyArrayObject *)given;
    int dimensions = kind == 'K' ? 2 : 1;
    if (!PyArray_Check(given) || !is_kind(array, kind) || PyArray_NDIM(array) != dimensions ||
        !PyArray_ISCARRAY(array)) {
        PyErr_Format(PyExc_TypeError, "argument %zd of %s is no contiguous, writable array of kind '%c': %R", i + 1,
                     kernel->name, kind, given);
        return -1;
    }
    at[0] = (int64_t)(intptr_t)PyArray_DATA(array);
    for (int d = 0; d < dimensions; d++) at[1 + d] = PyArray_DIM(array, d);
    return 1 + dimensions;
}

static PyObject *answer(const Kernel *kernel, const int64_t *out) {
    switch (kernel->result) {
    case 'n': return PyLong_FromLongLong(out[0]);
    case '2': return Py_BuildValue("(LL)", (long long)out[0], (long long)out[1]);
    default: Py_INCREF(Py_None); return Py_None;
    }
}

static PyObject *call(PyObject *self, PyObject *const *given, Py_ssize_t count) {
    const Kernel *kernel = PyCapsule_GetPointer(self, NULL);
    if (kernel == NULL) return NULL;
    if (count != (Py_ssize_t)strlen(kernel->arguments))
        return PyErr_Format(PyExc_TypeError, "%s takes %zu arguments, got %zd", kernel->name,
                            strlen(kernel->arguments), count);
    int64_t words[MAX_ARGUMENTS * WORDS_AN_ARRAY], out[2] = {0, 0}, raised;
    int64_t *at = words;
    for (Py_ssize_t i = 0; i < count; i++) {
        int n = put(kernel, i, given[i], at);
        if (n < 0) return NULL;
        at += n;
    }
    Py_BEGIN_ALLOW_THREADS
    raised = kernel->section(words, out);
    Py_END_ALLOW_THREADS
    if (raised) return PyErr_Format(PyExc_RuntimeError, "%s raised: a number that is never 0 was", kernel->name);
    return answer(kernel, out);
}

static int fill(PyObject *module) {
    import_array1(-1);
    if (PyModule_AddStringConstant(module, "SOURCES", KVPLUG_SOURCES) < 0 ||
        PyModule_AddStringConstant(module, "CALLER", KVPLUG_CALLER) < 0)
        return -1;
    for (size_t i = 0; i < N_KERNELS; i++) {
        methods[i] = (PyMethodDef){kernels[i].name, (PyCFunction)(void (*)(void))call, METH_FASTCALL, NULL};
        PyObject *self = PyCapsule_New((void *)&kernels[i], NULL, NULL);
        if (self == NULL) return -1;
        PyObject *function = PyCFunction_NewEx(&methods[i], self, NULL);
        Py_DECREF(self);
        if (function == NULL) return -1;
        int status = PyModule_AddObjectRef(module, kernels[i].name, function);
        Py_DECREF(function);
        if (status < 0) return -1;
    }
    return 0;
}

static PyModuleDef_Slot slots[] = {{Py_mod_exec, fill}, {0, NULL}};
static PyModuleDef definition = {
    .m_base = PyModuleDef_HEAD_INIT,
    .m_name = "kvplug.shm.kernels",
    .m_slots = slots,
};

PyMODINIT_FUNC PyInit_kernels(void) { return PyModuleDef_Init(&definition); }
