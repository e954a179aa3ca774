"""Triton's interpreter, made quicker."""

from functools import cache


def quicken():
    """Let a launch ready Triton's language once; what kernels compute stays the same.

    The interpreter puts functions of its own in place of Triton's, which it finds by listing whole modules: at a launch, and
    again whenever a kernel calls a function. That took two fifths of the time. Here a call readies only what its launch has not met.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    patch, launch, met = interpreter._patch_lang, interpreter.GridExecutor.__call__, set()

    @cache
    def modules(function):
        return frozenset(value.__name__ for value in function.__globals__.values() if value is tl or value is tl.core)

    def patch_once(function):
        if met.issuperset(modules(function)):
            return None  # only the launch puts back what it has changed
        met.update(modules(function))
        return patch(function)

    def launch_anew(*arguments, **options):
        met.clear()
        return launch(*arguments, **options)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, launch_anew
