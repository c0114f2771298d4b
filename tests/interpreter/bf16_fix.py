"""bf16 in Triton's interpreter, made right or refused.

The interpreter keeps bf16 as its bit pattern in uint16. Casts to and from fp32 know that; `tl.dot` and
arithmetic do not and silently compute with the patterns as integers, and fp32 to bf16 cuts off instead of
rounding. On a GPU all three work. After `install()`:

- casts between bf16 and any other type are exact or round to nearest even, as on the GPU;
- `tl.dot` takes bf16 operands (its result stays fp32);
- arithmetic, comparisons and reductions on bf16 raise: the kernels' rule is to compute in fp32, and an op
  that works on a GPU but cannot be tested here would go untested.
"""

from __future__ import annotations

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_installed = False


def bf16_to_fp32(bits: np.ndarray) -> np.ndarray:
    """uint16 patterns to the fp32 values they stand for, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def fp32_to_bf16(values: np.ndarray) -> np.ndarray:
    """fp32 values to bf16 patterns in uint16, round to nearest even; NaN becomes the quiet NaN."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    # adding 0x7FFF, and one more where the last kept bit is odd, carries exactly when rounding goes up
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def install() -> None:
    """Repair the interpreter of this process; a second call does nothing."""
    global _installed
    if _installed:
        return
    _installed = True
    _repair_casts()
    _repair_dot()
    _refuse_arithmetic()


def _is_bf16(handle: TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _widened(handle: TensorHandle) -> TensorHandle:
    return TensorHandle(bf16_to_fp32(handle.data), tl.float32) if _is_bf16(handle) else handle


def _repair_casts() -> None:
    original_cast = InterpreterBuilder.cast_impl
    original_fp_to_fp = InterpreterBuilder.create_fp_to_fp

    def cast_impl(self, src, dst_type):
        if _is_bf16(src) and dst_type.scalar == tl.bfloat16:
            return src
        if dst_type.scalar == tl.bfloat16:
            return TensorHandle(fp32_to_bf16(src.data.astype(np.float32)), tl.bfloat16)
        return original_cast(self, _widened(src), dst_type)

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        to_nearest = rounding_mode is None or rounding_mode == interpreter._ir.ROUNDING_MODE.RTNE
        if tl.bfloat16 in (src.dtype.scalar, dst_type.scalar) and to_nearest:
            return cast_impl(self, src, dst_type)
        return original_fp_to_fp(self, src, dst_type, rounding_mode)

    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_fp_to_fp = create_fp_to_fp


def _repair_dot() -> None:
    original = InterpreterBuilder.create_dot

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        if _is_bf16(d):
            raise TypeError("tl.dot with a bf16 accumulator: accumulate in fp32")
        return original(self, _widened(a), _widened(b), d, input_precision, max_num_imprecise_acc)

    InterpreterBuilder.create_dot = create_dot


def _refuse_arithmetic() -> None:
    def refuse(name: str, copies: tuple = ()) -> None:
        """Make `InterpreterBuilder.name` raise on a bf16 operand, unless its `op` only copies values."""
        original = getattr(InterpreterBuilder, name)

        def checked(self, *args):
            if args[-1] not in copies and any(isinstance(a, TensorHandle) and _is_bf16(a) for a in args):
                raise TypeError("arithmetic on bf16 in a kernel: cast to fp32 first")
            return original(self, *args)

        setattr(InterpreterBuilder, name, checked)

    refuse("binary_op")
    refuse("unary_op")
    refuse("ternary_op", copies=(np.where,))
    refuse("create_fma")
    refuse("create_atomic_rmw")

    original_check = interpreter.ReduceScanOpInterface.check_tensor

    def check_tensor(self, input):
        if any(t.dtype.scalar == tl.bfloat16 for t in input):
            raise TypeError("reduction over bf16 in a kernel: cast to fp32 first")
        return original_check(self, input)

    interpreter.ReduceScanOpInterface.check_tensor = check_tensor
