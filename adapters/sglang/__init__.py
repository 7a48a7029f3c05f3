"""SGLang: one pool for the caches of all its schedulers, by HiCache's storage interface or the cache linker."""
