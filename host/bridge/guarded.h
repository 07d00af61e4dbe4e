// From C++ exceptions to what a caller in Rust gets: false, and a message from malloc.
#pragma once

#include <cstring>
#include <exception>

#include <c10/util/Exception.h>

template <typename Body>
bool guarded(char** error, Body body) {
    try {
        body();
        return true;
    } catch (const c10::Error& caught) {
        *error = strdup(caught.what_without_backtrace());
    } catch (const std::exception& caught) {
        *error = strdup(caught.what());
    } catch (...) {
        *error = strdup("an unknown C++ exception");
    }
    return false;
}
