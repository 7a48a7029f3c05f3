"""How bytes come from another host: what a data path is, a read spread over lanes, and the path over TCP."""
