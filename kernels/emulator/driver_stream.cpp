// Streams, events, capture and graphs.
#include <string.h>
#include <time.h>

#include <algorithm>

#include "driver.h"

namespace driver {

namespace {

struct Streams {
    std::mutex mutex;
    std::condition_variable finished;
    std::vector<Stream*> all;  // without those of the threads
    Stream legacy;
    uint64_t turn = 0;
};

Streams& streams() {
    static Streams* instance = new Streams;  // outlives every thread
    return *instance;
}

double now() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return static_cast<double>(t.tv_sec) * 1e3 + static_cast<double>(t.tv_nsec) * 1e-6;
}

using Lock = std::unique_lock<std::mutex>;

// Does the work of a stream up to `ticket`, in order; the lock is released while a task runs.
CUresult drain_until(Lock& lock, Stream& stream, uint64_t ticket) {
    while (stream.finished < ticket) {
        if (stream.busy) {
            streams().finished.wait(lock);
            continue;
        }
        Task task = std::move(stream.queue.front());
        stream.queue.pop_front();
        stream.busy = true;
        const bool skip = stream.error != CUDA_SUCCESS;
        lock.unlock();
        const CUresult result = skip ? CUDA_SUCCESS : task();
        task = nullptr;
        lock.lock();
        stream.busy = false;
        ++stream.finished;
        if (result != CUDA_SUCCESS) stream.error = result;
        streams().finished.notify_all();
    }
    return stream.error;
}

CUresult drain_all_of(Lock& lock, bool blocking_only) {
    CUresult result = drain_until(lock, streams().legacy, streams().legacy.submitted);
    for (size_t i = 0; i < streams().all.size(); ++i) {
        Stream& stream = *streams().all[i];
        if (blocking_only && !stream.blocking) continue;
        const CUresult one = drain_until(lock, stream, stream.submitted);
        if (result == CUDA_SUCCESS) result = one;
    }
    return result;
}

}  // namespace

Stream* resolve(CUstream handle) {
    static thread_local Stream* of_thread = nullptr;
    if (handle == nullptr || reinterpret_cast<uintptr_t>(handle) == 1) return &streams().legacy;
    if (reinterpret_cast<uintptr_t>(handle) == 2) {
        if (!of_thread) {
            of_thread = new Stream;
            Lock lock(streams().mutex);
            streams().all.push_back(of_thread);
        }
        return of_thread;
    }
    Lock lock(streams().mutex);
    auto& all = streams().all;
    return std::find(all.begin(), all.end(), handle) != all.end() ? handle : nullptr;
}

CUresult submit(CUstream handle, Task task) {
    Stream* stream = resolve(handle);
    if (!stream) return CUDA_ERROR_INVALID_HANDLE;
    Lock lock(streams().mutex);
    if (stream->capture) {
        if (stream->capture->invalid) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
        stream->capture->tasks.push_back(std::move(task));
        return CUDA_SUCCESS;
    }
    if (stream->error != CUDA_SUCCESS) return stream->error;
    if (stream == &streams().legacy) {
        for (Stream* other : streams().all) {
            if (!other->blocking) continue;
            if (other->capture) return CUDA_ERROR_STREAM_CAPTURE_IMPLICIT;
            drain_until(lock, *other, other->submitted);
        }
    } else if (stream->blocking) {
        drain_until(lock, streams().legacy, streams().legacy.submitted);
    }
    stream->queue.push_back(std::move(task));
    ++stream->submitted;
    // Now and then at once, so that neither order is the only one seen; and the queue stays short.
    const uint64_t turn = (++streams().turn + settings().seed) * 0x9e3779b97f4a7c15ull >> 32;
    if (turn % 8 == 0 || stream->queue.size() > 64) drain_until(lock, *stream, stream->submitted);
    return CUDA_SUCCESS;
}

CUresult drain(Stream* stream) {
    Lock lock(streams().mutex);
    return drain_until(lock, *stream, stream->submitted);
}

CUresult drain_all() {
    Lock lock(streams().mutex);
    return drain_all_of(lock, false);
}

CUresult drain_legacy() {
    Lock lock(streams().mutex);
    return drain_all_of(lock, true);
}

bool any_capture() {
    Lock lock(streams().mutex);
    for (const Stream* stream : streams().all) {
        if (stream->capture) return true;
    }
    return false;
}

bool capturing(CUstream handle) {
    const Stream* stream = resolve(handle);
    return stream && stream->capture;
}

}  // namespace driver

using namespace driver;

// ---- streams ----

DRIVER_API cuStreamCreate(CUstream* stream, unsigned flags) {
    auto* fresh = new Stream;
    fresh->blocking = (flags & 1) == 0;  // CU_STREAM_NON_BLOCKING
    Lock lock(streams().mutex);
    streams().all.push_back(fresh);
    *stream = fresh;
    return CUDA_SUCCESS;
}
DRIVER_API cuStreamCreateWithPriority(CUstream* stream, unsigned flags, int) { return cuStreamCreate(stream, flags); }

DRIVER_API cuStreamDestroy_v2(CUstream handle) {
    Stream* stream = resolve(handle);
    if (!stream || reinterpret_cast<uintptr_t>(handle) <= 2) return CUDA_ERROR_INVALID_HANDLE;
    Lock lock(streams().mutex);
    drain_until(lock, *stream, stream->submitted);  // the driver lets the work finish, too
    auto& all = streams().all;
    all.erase(std::find(all.begin(), all.end(), stream));
    // Events may still name it: it is kept, empty.
    return CUDA_SUCCESS;
}

DRIVER_API cuStreamSynchronize(CUstream handle) {
    Stream* stream = resolve(handle);
    if (!stream) return CUDA_ERROR_INVALID_HANDLE;
    if (stream->capture) {
        stream->capture->invalid = true;
        explain("cuStreamSynchronize on a stream that captures");
        return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    }
    return stream == &streams().legacy ? drain_legacy() : drain(stream);
}

DRIVER_API cuStreamQuery(CUstream handle) {
    Stream* stream = resolve(handle);
    if (!stream) return CUDA_ERROR_INVALID_HANDLE;
    if (stream->capture) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    Lock lock(streams().mutex);
    if (stream->finished == stream->submitted) return stream->error;
    if (!stream->busy) drain_until(lock, *stream, stream->finished + 1);  // who polls gets on
    return CUDA_ERROR_NOT_READY;
}

DRIVER_API cuStreamGetCtx(CUstream, CUcontext* context);
extern "C" CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device);
CUresult cuStreamGetCtx(CUstream, CUcontext* context) { return cuDevicePrimaryCtxRetain(context, 0); }
DRIVER_API cuStreamGetFlags(CUstream handle, unsigned* flags) {
    Stream* stream = resolve(handle);
    if (!stream) return CUDA_ERROR_INVALID_HANDLE;
    *flags = stream->blocking ? 0 : 1;
    return CUDA_SUCCESS;
}
DRIVER_API cuStreamGetPriority(CUstream, int* priority) {
    *priority = 0;
    return CUDA_SUCCESS;
}
DRIVER_API cuLaunchHostFunc(CUstream stream, void (*function)(void*), void* data) {
    return submit(stream, [=] {
        function(data);
        return CUDA_SUCCESS;
    });
}

// ---- events ----

DRIVER_API cuEventCreate(CUevent* event, unsigned flags) {
    *event = new Event;
    (*event)->timing = (flags & 2) == 0;  // CU_EVENT_DISABLE_TIMING
    return CUDA_SUCCESS;
}

DRIVER_API cuEventDestroy_v2(CUevent event) {
    if (!event) return CUDA_ERROR_INVALID_HANDLE;
    if (event->stream && !event->graph) {  // a queued record still writes the time
        Lock lock(streams().mutex);
        drain_until(lock, *event->stream, event->ticket);
    }
    delete event;
    return CUDA_SUCCESS;
}

DRIVER_API cuEventRecord(CUevent event, CUstream handle) {
    Stream* stream = resolve(handle);
    if (!stream || !event) return CUDA_ERROR_INVALID_HANDLE;
    if (stream->capture) {
        event->graph = stream->capture;
        event->stream = stream;
        return CUDA_SUCCESS;
    }
    if (event->stream && !event->graph) {
        Lock lock(streams().mutex);
        if (event->stream != stream) drain_until(lock, *event->stream, event->ticket);
    }
    const CUresult result = submit(handle, [event] {
        event->milliseconds = now();
        return CUDA_SUCCESS;
    });
    if (result != CUDA_SUCCESS) return result;
    Lock lock(streams().mutex);
    event->graph.reset();
    event->stream = stream;
    event->ticket = stream->submitted;
    return CUDA_SUCCESS;
}
DRIVER_API cuEventRecordWithFlags(CUevent event, CUstream stream, unsigned) { return cuEventRecord(event, stream); }

DRIVER_API cuEventSynchronize(CUevent event) {
    if (!event) return CUDA_ERROR_INVALID_HANDLE;
    if (event->graph) return CUDA_ERROR_CAPTURED_EVENT;
    if (!event->stream) return CUDA_SUCCESS;
    Lock lock(streams().mutex);
    return drain_until(lock, *event->stream, event->ticket);
}

DRIVER_API cuEventQuery(CUevent event) {
    if (!event) return CUDA_ERROR_INVALID_HANDLE;
    if (event->graph) return CUDA_ERROR_CAPTURED_EVENT;
    if (!event->stream) return CUDA_SUCCESS;
    Lock lock(streams().mutex);
    Stream& stream = *event->stream;
    if (stream.finished >= event->ticket) return stream.error;
    if (!stream.busy) drain_until(lock, stream, stream.finished + 1);
    return CUDA_ERROR_NOT_READY;
}

DRIVER_API cuEventElapsedTime_v2(float* milliseconds, CUevent start, CUevent end) {
    if (!start || !end || !start->stream || !end->stream || !start->timing || !end->timing) return CUDA_ERROR_INVALID_HANDLE;
    for (CUevent event : {start, end}) {
        if (event->stream->finished < event->ticket) return CUDA_ERROR_NOT_READY;
    }
    *milliseconds = static_cast<float>(end->milliseconds - start->milliseconds);
    return CUDA_SUCCESS;
}
DRIVER_API cuEventElapsedTime(float* milliseconds, CUevent start, CUevent end) { return cuEventElapsedTime_v2(milliseconds, start, end); }

DRIVER_API cuStreamWaitEvent(CUstream handle, CUevent event, unsigned) {
    Stream* stream = resolve(handle);
    if (!stream || !event) return CUDA_ERROR_INVALID_HANDLE;
    if (event->graph) {  // the stream joins the capture; a recorded graph keeps the order of the calls
        if (stream->capture && stream->capture != event->graph) return CUDA_ERROR_STREAM_CAPTURE_ISOLATION;
        if (!stream->capture) {
            stream->capture = event->graph;
            ++event->graph->open_streams;
        } else if (!event->stream->capture_origin && event->stream->capture) {
            event->stream->capture.reset();  // joined back
            --event->graph->open_streams;
        }
        return CUDA_SUCCESS;
    }
    if (!event->stream) return CUDA_SUCCESS;
    if (stream->capture) {
        stream->capture->invalid = true;
        explain("a stream that captures waits for an event that was recorded outside of the capture");
        return CUDA_ERROR_STREAM_CAPTURE_ISOLATION;
    }
    if (event->stream == stream) return CUDA_SUCCESS;
    Stream* source = event->stream;
    const uint64_t ticket = event->ticket;
    return submit(handle, [source, ticket] {
        Lock lock(streams().mutex);
        return drain_until(lock, *source, ticket);
    });
}

// ---- capture and graphs ----

DRIVER_API cuStreamBeginCapture_v2(CUstream handle, int) {
    Stream* stream = resolve(handle);
    if (!stream) return CUDA_ERROR_INVALID_HANDLE;
    if (stream == &streams().legacy) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    if (stream->capture) return CUDA_ERROR_INVALID_VALUE;
    stream->capture = std::make_shared<Graph>();
    stream->capture_origin = true;
    return CUDA_SUCCESS;
}

DRIVER_API cuStreamEndCapture(CUstream handle, CUgraph* graph) {
    Stream* stream = resolve(handle);
    if (!stream) return CUDA_ERROR_INVALID_HANDLE;
    *graph = nullptr;
    if (!stream->capture) return CUDA_ERROR_INVALID_VALUE;
    if (!stream->capture_origin) return CUDA_ERROR_STREAM_CAPTURE_UNMATCHED;
    std::shared_ptr<Graph> captured = std::move(stream->capture);
    stream->capture.reset();
    stream->capture_origin = false;
    if (captured->open_streams) {
        for (Stream* other : streams().all) {
            if (other->capture == captured) other->capture.reset();
        }
        explain("cuStreamEndCapture: another stream took part and was not joined by an event");
        return CUDA_ERROR_STREAM_CAPTURE_UNJOINED;
    }
    if (captured->invalid) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
    *graph = new std::shared_ptr<Graph>(std::move(captured));
    return CUDA_SUCCESS;
}

DRIVER_API cuStreamIsCapturing(CUstream handle, int* status) {
    Stream* stream = resolve(handle);
    if (!stream) return CUDA_ERROR_INVALID_HANDLE;
    *status = !stream->capture ? 0 : stream->capture->invalid ? 2 : 1;
    return CUDA_SUCCESS;
}

DRIVER_API cuStreamGetCaptureInfo_v2(CUstream handle, int* status, uint64_t* id, void**, void**, size_t*) {
    if (id) *id = reinterpret_cast<uintptr_t>(handle);
    return cuStreamIsCapturing(handle, status);
}

DRIVER_API cuThreadExchangeStreamCaptureMode(int*) { return CUDA_SUCCESS; }

DRIVER_API cuGraphInstantiateWithFlags(CUgraphExec* executable, CUgraph graph, unsigned long long flags) {
    if (!graph) return CUDA_ERROR_INVALID_HANDLE;
    if ((flags & 5) == 5) return CUDA_ERROR_INVALID_VALUE;  // auto-free and device launch exclude each other
    *executable = new std::vector<Task>((*graph)->tasks);
    return CUDA_SUCCESS;
}

DRIVER_API cuGraphGetNodes(CUgraph graph, void**, size_t* count) {
    if (!graph) return CUDA_ERROR_INVALID_HANDLE;
    *count = (*graph)->tasks.size();
    return CUDA_SUCCESS;
}

DRIVER_API cuGraphLaunch(CUgraphExec executable, CUstream stream) {
    if (!executable) return CUDA_ERROR_INVALID_HANDLE;
    for (const Task& task : *executable) {
        const CUresult result = submit(stream, task);
        if (result != CUDA_SUCCESS) return result;
    }
    return CUDA_SUCCESS;
}
DRIVER_API cuGraphUpload(CUgraphExec executable, CUstream) { return executable ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE; }

DRIVER_API cuGraphDestroy(CUgraph graph) {
    delete graph;
    return CUDA_SUCCESS;
}
DRIVER_API cuGraphExecDestroy(CUgraphExec executable) {
    delete executable;
    return CUDA_SUCCESS;
}
