/* A libcuda.so.1 without a GPU. The environment chooses what it answers: STUB_DRIVER_VERSION is the version of CUDA that
   the driver supports, such as 12040, and STUB_DRIVER_ERROR the error with which it refuses to start. */
#include <stdlib.h>
#include <string.h>

static int from_environment(const char *name, int otherwise) {
    const char *value = getenv(name);
    return value ? atoi(value) : otherwise;
}

int cuInit(unsigned flags) { return from_environment("STUB_DRIVER_ERROR", 0); }

int cuDriverGetVersion(int *version) {
    *version = from_environment("STUB_DRIVER_VERSION", 13000);
    return 0;
}

int cuDeviceGetCount(int *count) {
    *count = 0;
    return 0;
}

static int unknown_error(void) { return 999; }

/* CUDA's runtime asks for every function by its name. */
int cuGetProcAddress(const char *name, void **function, int version, unsigned long long flags) {
    if (!strcmp(name, "cuInit")) *function = cuInit;
    else if (!strcmp(name, "cuDriverGetVersion")) *function = cuDriverGetVersion;
    else if (!strcmp(name, "cuDeviceGetCount")) *function = cuDeviceGetCount;
    else if (!strncmp(name, "cuGetProcAddress", 16)) *function = cuGetProcAddress;
    else *function = unknown_error;
    return 0;
}

int cuGetProcAddress_v2(const char *name, void **function, int version, unsigned long long flags, void *status) {
    return cuGetProcAddress(name, function, version, flags);
}
