"""The pool under fire: processes that write, read, pin and evict while they are killed, stopped and forked."""
