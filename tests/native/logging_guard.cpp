// Streams and events of a device that has none: torch is told that there are some, and every order given to them is logged.
//
// torch's own code, such as its futures, then treats the fake device of tests/support/fake_device.py as it treats any other with
// streams. Nothing runs late, so the log says what would be waited for: "record EVENT STREAM", "wait EVENT STREAM",
// "use STREAM"; a stream is written DEVICE/NUMBER.

#include <c10/core/Allocator.h>
#include <c10/core/Stream.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <atomic>
#include <cstdint>
#include <mutex>
#include <string>

namespace {

using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
using c10::Stream;
using c10::StreamId;

constexpr DeviceIndex kDevices = 4;

std::mutex log_mutex;  // Protects `logged`; held while a line is added or all are taken.
std::string logged;
std::atomic<StreamId> last_stream{0};
std::atomic<std::intptr_t> last_event{0};
thread_local StreamId current_streams[kDevices] = {};
thread_local DeviceIndex current_device = 0;

void log_line(const std::string& line) {
  std::lock_guard<std::mutex> lock(log_mutex);
  logged += line + "\n";
}

std::string name(const Stream& stream) {
  return std::to_string(stream.device_index()) + "/" + std::to_string(stream.id());
}

std::string name(void* event) {
  return std::to_string(reinterpret_cast<std::intptr_t>(event));
}

struct LoggingGuard final : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override {
    return DeviceType::PrivateUse1;
  }
  Device getDevice() const override {
    return Device(type(), current_device);
  }
  Device exchangeDevice(Device device) const override {
    const Device former = getDevice();
    current_device = device.index();
    return former;
  }
  void setDevice(Device device) const override {
    current_device = device.index();
  }
  void uncheckedSetDevice(Device device) const noexcept override {
    current_device = device.index();
  }
  DeviceIndex deviceCount() const noexcept override {
    return kDevices;
  }

  Stream getStream(Device device) const override {
    const DeviceIndex index = device.has_index() ? device.index() : current_device;
    return Stream(Stream::UNSAFE, Device(type(), index), current_streams[index]);
  }
  Stream getDefaultStream(Device device) const override {
    return Stream(Stream::UNSAFE, device, 0);
  }
  Stream getNewStream(Device device, int) const override {
    const DeviceIndex index = device.has_index() ? device.index() : current_device;
    return Stream(Stream::UNSAFE, Device(type(), index), ++last_stream);
  }
  Stream getStreamFromGlobalPool(Device device, bool) const override {
    return getNewStream(device, 0);
  }
  Stream exchangeStream(Stream stream) const override {
    const Stream former = getStream(stream.device());
    current_streams[stream.device_index()] = stream.id();
    return former;
  }

  void record(void** event, const Stream& stream, const DeviceIndex, const c10::EventFlag) const override {
    if (*event == nullptr) {
      *event = reinterpret_cast<void*>(++last_event);
    }
    log_line("record " + name(*event) + " " + name(stream));
  }
  void block(void* event, const Stream& stream) const override {
    log_line("wait " + name(event) + " " + name(stream));
  }
  bool queryEvent(void*) const override {
    return true;
  }
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const DeviceIndex) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const Stream& stream) const override {
    log_line("use " + name(stream));
  }
};

}  // namespace

extern "C" {

void install_guard() {
  static LoggingGuard guard;
  c10::impl::device_guard_impl_registry[static_cast<int>(DeviceType::PrivateUse1)].store(&guard);
}

void add_line(const char* line) {
  log_line(line);
}

// The log so far, which is empty afterwards. The text is good until the next call.
const char* take_log() {
  static std::string taken;
  std::lock_guard<std::mutex> lock(log_mutex);
  taken.swap(logged);
  logged.clear();
  return taken.c_str();
}

}  // extern "C"
