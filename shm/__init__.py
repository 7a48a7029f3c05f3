"""The pool on one host: segment, lock, tables, index, slabs, clients and pins, eviction, recovery."""
