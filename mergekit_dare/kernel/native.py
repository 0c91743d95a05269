"""Call a compiled package from several threads at once.

torch's own loader holds the interpreter's lock while the code runs, so that threads would wait for
one another. The library inside has the C interface that AOTInductor gives to programs without
Python, which ``ctypes`` calls without the lock. Both ways are here, and nothing else of torch that
is not public: :func:`load` takes the C interface, and torch's loader where that fails.
"""

from __future__ import annotations

import ctypes
import os
import tempfile
from collections.abc import Callable, Sequence
from ctypes import (
    addressof,
    byref,
    c_char_p,
    c_double,
    c_float,
    c_int32,
    c_int64,
    c_size_t,
    c_void_p,
    sizeof,
)
from functools import cache

import torch
from torch import Tensor

from mergekit_dare.kernel import packages, threads
from mergekit_dare.kernel.formula import SUPPORTED_DTYPES, Numbers, dtype_name

# Takes the result, theta_0 and each theta_k, and the numbers; returns a package's one output.
Code = Callable[[Sequence[Tensor], Numbers], float]


def load(package: bytes, dtype: torch.dtype) -> Code:
    """Return what runs a package on contiguous tensors of the CPU.

    Args:
        package: Of :func:`mergekit_dare.kernel.packages.read`.
        dtype: Of its output: float32 or float64.

    Raises:
        NoPackageError: it is damaged.
        Exception: neither way of loading it works here.

    """
    library = packages.library(package)
    try:
        return _by_c_interface(library, dtype)
    except (OSError, AttributeError, RuntimeError):
        return _by_torch(package)


def _by_torch(package: bytes) -> Code:
    """By torch's public function, which imports its compiler: that takes two seconds."""
    with tempfile.NamedTemporaryFile(suffix=".pt2") as file:
        file.write(package)
        file.flush()
        model = torch._inductor.aoti_load_package(file.name)

    def run(vectors: Sequence[Tensor], numbers: Numbers) -> float:
        out, theta_0, *thetas = vectors
        integers, floats = numbers.as_lists()
        vectors_of_numbers = (  # of the CPU, whatever the default device of the program is
            torch.tensor(integers, dtype=torch.int64, device="cpu"),
            torch.tensor(floats, dtype=torch.float64, device="cpu"),
        )
        return float(model(out, theta_0, thetas, *vectors_of_numbers))

    return run


def _by_c_interface(library: bytes, dtype: torch.dtype) -> Code:
    """By what torch declares in ``torch/csrc/inductor/aoti_runtime/interface.h``."""
    of_torch, of_package, container = _of_torch(), _open(library), c_void_p()
    # So many threads may run it at once.
    create = of_package.AOTInductorModelContainerCreateWithDevice
    _check(create(byref(container), c_size_t(threads.MOST), c_char_p(b"cpu"), None))
    outputs = c_size_t()
    _check(of_package.AOTInductorModelContainerGetNumOutputs(container, byref(outputs)))
    if outputs.value != 1:
        raise RuntimeError(f"it has {outputs.value} outputs")
    call = of_package.AOTInductorModelContainerRun
    call.argtypes = [c_void_p, c_void_p, c_size_t, c_void_p, c_size_t, c_void_p, c_void_p]
    number = c_float if dtype == torch.float32 else c_double
    one, cpu = (c_int64 * 1)(1), of_torch.aoti_torch_device_type_cpu()
    create_tensor = of_torch.aoti_torch_create_tensor_from_blob
    codes = {
        each: getattr(of_torch, f"aoti_torch_dtype_{dtype_name(each)}")()
        for each in (*SUPPORTED_DTYPES, torch.int64)
    }

    def run(vectors: Sequence[Tensor], numbers: Numbers) -> float:
        integers, floats = numbers.as_lists()
        of_integers = (c_int64 * len(integers))(*integers)
        of_floats = (c_double * len(floats))(*floats)
        inputs = [(vector.data_ptr(), vector.shape[0], vector.dtype) for vector in vectors]
        inputs.append((addressof(of_integers), len(integers), torch.int64))
        inputs.append((addressof(of_floats), len(floats), torch.float64))
        # The tensors behind the handles that are made here are gone when the call returns.
        given, returned, place = (c_void_p * len(inputs))(), (c_void_p * 1)(), c_void_p()
        for index, (address, size, its_dtype) in enumerate(inputs):
            sizes, handle = (c_int64 * 1)(size), byref(given, index * sizeof(c_void_p))
            _check(create_tensor(address, 1, sizes, one, 0, codes[its_dtype], cpu, 0, handle))
        _check(call(container, given, len(inputs), returned, 1, None, None))
        output = returned[0]
        try:
            _check(of_torch.aoti_torch_get_data_ptr(output, byref(place)))
            assert place.value is not None
            return float(number.from_address(place.value).value)
        finally:
            of_torch.aoti_torch_delete_tensor_object(output)

    return run


def _open(library: bytes) -> ctypes.CDLL:
    """Load a shared library, whose file need not stay."""
    # A folder for temporary files may forbid code; the one of the packages may be read-only.
    own = packages.folder()
    with tempfile.NamedTemporaryFile(
        suffix=".so", dir=own if os.access(own, os.W_OK) else None
    ) as file:
        file.write(library)
        file.flush()
        return ctypes.CDLL(file.name)


@cache
def _of_torch() -> ctypes.CDLL:
    """Return torch's own C functions, of ``torch/csrc/inductor/aoti_torch/c/shim.h``."""
    functions = ctypes.CDLL(torch._C.__file__)
    pointer, number = c_void_p, c_int64
    functions.aoti_torch_create_tensor_from_blob.argtypes = [
        *(pointer, number, pointer, pointer, number),  # data, dimensions, sizes, strides, offset
        *(c_int32, c_int32, c_int32, pointer),  # dtype, device, its number, the handle
    ]
    functions.aoti_torch_get_data_ptr.argtypes = [pointer, pointer]
    functions.aoti_torch_delete_tensor_object.argtypes = [pointer]
    return functions


def _check(error: int) -> None:
    if error != 0:
        raise RuntimeError("torch's C interface reports an error")
