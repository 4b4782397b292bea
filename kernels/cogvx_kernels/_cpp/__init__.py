"""Operations in C++ for CPUs, compiled for this machine when they are first asked for."""
