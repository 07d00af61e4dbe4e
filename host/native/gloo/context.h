// libtorch's ProcessGroupGloo.hpp names some classes of gloo, whose headers are not among libtorch's. Nothing of them is used
// here, and none is made: that they are declared is enough. (gloo/ has a file for each that it includes; all is in this one.)
#pragma once

#include <chrono>
#include <memory>
#include <string>
#include <vector>

namespace gloo {

class Context {
  public:
    void setTimeout(std::chrono::milliseconds timeout);
};

namespace transport {
class Device;
class UnboundBuffer {
  public:
    virtual ~UnboundBuffer();
};
}  // namespace transport

namespace rendezvous {
class Store {
  public:
    virtual ~Store();
    virtual void set(const std::string& key, const std::vector<char>& value) = 0;
    virtual std::vector<char> get(const std::string& key) = 0;
    virtual void wait(const std::vector<std::string>& keys) = 0;
    virtual void wait(const std::vector<std::string>& keys, const std::chrono::milliseconds& timeout) = 0;
};
}  // namespace rendezvous

}  // namespace gloo
