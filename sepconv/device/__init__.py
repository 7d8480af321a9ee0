"""A network as a C library that needs nothing, for other machines than this one: ``export_c``.

record      the program of a network, with kernels for the other machine, bound to memory of this process and run
objects     the kernels once more, as object code for the other machine
glue        what calls them in order, the weights and the arena, as object code made by LLVM
scratch     memory for kernels while they run, a part of the arena
loops       threads that share out the loops of kernels, where they are asked for
elf         all objects in one
archive     objects in a library
files       header, example and what else lies beside it
check       the example, built and run here if that can be
"""

from sepconv.device.export import ExportedLibrary as ExportedLibrary
from sepconv.device.export import export_c as export_c
