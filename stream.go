// One browser's stream: order, buffer, slow clients, end. Who may have one is in sidecar.go, the callbacks in ask.go.

package main

import (
	"encoding/json"
	"errors"
	"math/rand/v2"
	"net"
	"os"
	"runtime"
	"strconv"
	"sync"
	"syscall"
	"time"
	"unsafe"
)

// Why a stream ended, in the disconnect callback and in metrics.
const (
	clientClosed = "client_closed"
	serverClosed = "server_closed"
	streamError  = "error" // write failure, slow client, buffer overflow
)

// sendStatus is what became of an event, in metrics.
type sendStatus string

const (
	sendWritten  sendStatus = "written"       // the socket or the stream's buffer took it
	sendBuffered sendStatus = "buffered"      // it waits for the connect callback
	sendUnknown  sendStatus = "unknown_token" // there is no such stream, or it takes nothing more
)

// streamState is where a stream is in its life. It only goes up.
type streamState int

const (
	streamConnecting streamState = iota // the connect callback is under way
	streamOpen
	streamEnding     // takes nothing more; ends once pending has been written
	streamOverflowed // the same, because more was sent than may wait; ends once the client has what was written
	streamEnded
)

// stream is one browser's connection, from the connect callback to its end.
//
// An event is written by the goroutine that sends it, without blocking. What the socket does not take waits in pending.
// Only then does a goroutine of the stream run (drain), until the client has caught up. So an idle stream costs one
// goroutine, parked in Read, and an event one system call.
type stream struct {
	token   string
	request json.RawMessage // what both callbacks say of the request, encoded once; nil if they are not posted
	chunked bool            // HTTP/1.1; an HTTP/1.0 body ends with its connection
	cfg     *gatewayConfig

	beatEvent bool // heartbeats are events; set before open

	mu       sync.Mutex // guards the rest; held across a write, which cannot block, to keep the order
	state    streamState
	conn     net.Conn // nil until the connect callback has been answered
	raw      syscall.RawConn
	pending  []byte      // chunks that wait: at most STREAM_BUFFER_BYTES, or one event; once there is a conn, drain writes them
	written  uint64      // bytes given to the socket
	uptake   uptake      // how the client takes what is written
	reason   string      // set with streamEnded
	lifetime *time.Timer // ends the stream after its lifetime; nil without a limit
}

// An HTTP/1.1 body goes out in chunks (RFC 9112 section 7.1), one for each write. The size comes first, so room for it
// is left until it is known.
const chunkHead = len("ffffffff\r\n")

func reserveChunk(buf []byte) []byte {
	return append(buf[:0], "00000000\r\n"...)
}

// chunk makes a chunk of what was appended to a reserved buffer, in place.
func (s *stream) chunk(buf *[]byte) []byte {
	if !s.chunked {
		return (*buf)[chunkHead:]
	}
	var size [8]byte
	digits := strconv.AppendUint(size[:0], uint64(len(*buf)-chunkHead), 16)
	start := len("ffffffff") - len(digits)
	copy((*buf)[start:], digits)
	*buf = append(*buf, "\r\n"...)
	return (*buf)[start:]
}

// chunkBuffers are buffers for chunks.
var chunkBuffers = sync.Pool{New: func() any { return new([]byte) }}

const lastChunk = "0\r\n\r\n"

// send writes or buffers chunk, which may be empty, and ends the stream after it if end is set. It neither waits for
// the client nor keeps chunk.
func (s *stream) send(chunk []byte, end bool) sendStatus {
	s.mu.Lock()
	defer s.mu.Unlock()
	status := sendWritten
	if s.state == streamConnecting {
		status = sendBuffered
	}
	switch {
	case s.state >= streamEnding || len(chunk) == 0: // there is nothing to write
	case s.writableLocked():
		s.writeLocked(chunk)
	default:
		s.enqueueLocked(chunk)
	}
	if s.state >= streamEnding {
		return sendUnknown // it was over before, or is now: chunk was too much, or could not be written
	}
	if end {
		s.finishLocked()
	}
	return status
}

// open begins the response on conn with head and what was buffered. conn belongs to the stream from then on.
func (s *stream) open(conn net.Conn, head []byte, end bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.conn = conn
	s.raw, _ = conn.(syscall.Conn).SyscallConn() // fails for a nil connection alone
	s.state = max(s.state, streamOpen)
	buffered := s.pending
	s.pending = nil
	s.writeLocked(append(head, buffered...))
	if end || s.state == streamEnding {
		s.finishLocked()
	}
	if lifetime := s.cfg.MaxStream; lifetime > 0 && s.token != "" && s.state != streamEnded { // a refused client has none
		s.lifetime = time.AfterFunc(jitter(lifetime*4/5, lifetime), s.finish)
	}
}

// stuckLocked reports whether the client has acknowledged nothing for the timeout although it lacks something. Whether
// the socket takes bytes says too little: it takes heartbeats for a quarter of an hour after a client has vanished, and
// with a slow client it may have no room for long.
func (s *stream) stuckLocked() bool {
	queued := unacknowledged(s.raw)
	return s.uptake.stuck(s.written-queued, queued > 0 || len(s.pending) > 0, time.Now(), s.timeoutLocked())
}

// timeoutLocked is for how long the client may take nothing.
func (s *stream) timeoutLocked() time.Duration {
	if s.state == streamOverflowed {
		return min(s.cfg.WriteTimeout, overflowTimeout)
	}
	return s.cfg.WriteTimeout
}

// uptake is how far a client had come when it was last looked at.
type uptake struct {
	taken uint64    // bytes
	since time.Time // when it was first seen there; zero if it lacked nothing
}

// stuck notes how far the client is, and reports whether it has been there for the limit. The time counts from the
// first look at which it lacked something, not from the last byte that it took, which may be long ago when an event has
// just been sent.
func (u *uptake) stuck(taken uint64, lacks bool, now time.Time, limit time.Duration) bool {
	switch {
	case !lacks:
		*u = uptake{taken: taken}
	case taken != u.taken || u.since.IsZero():
		*u = uptake{taken, now}
	default:
		return now.Sub(u.since) >= limit
	}
	return false
}

// unacknowledged returns how many bytes the socket holds for the client. Only Linux tells; elsewhere it is 0, and
// stuckLocked goes by what the socket has taken.
func unacknowledged(raw syscall.RawConn) uint64 {
	const outQueue = 0x5411 // SIOCOUTQ
	var count int32         // stays 0 if it cannot be read
	if runtime.GOOS == "linux" {
		raw.Control(func(fd uintptr) {
			syscall.Syscall(syscall.SYS_IOCTL, fd, outQueue, uintptr(unsafe.Pointer(&count)))
		})
	}
	return uint64(count)
}

// cutIfStuck ends the stream if the client is stuck. The socket is asked only if something has been written since the
// client was seen to have everything.
func (s *stream) cutIfStuck() {
	s.mu.Lock()
	defer s.mu.Unlock()
	caughtUp := s.uptake.since.IsZero() && s.uptake.taken == s.written
	if s.writableLocked() && !caughtUp && s.stuckLocked() {
		s.cutLocked(streamError)
	}
}

// beat writes a heartbeat, unless drain runs.
func (s *stream) beat() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.writableLocked() {
		return
	}
	buf := chunkBuffers.Get().(*[]byte)
	defer chunkBuffers.Put(buf)
	*buf = append(reserveChunk(*buf), heartbeat...)
	if s.beatEvent {
		seconds := strconv.AppendFloat(nil, s.cfg.Heartbeat.Seconds(), 'f', -1, 64)
		*buf = appendEvent(reserveChunk(*buf), sentEvent{name: []byte("heartbeat"), data: seconds})
	}
	s.writeLocked(s.chunk(buf))
}

// finish ends the stream cleanly, once the client has been sent what came before.
func (s *stream) finish() { s.send(nil, true) }

// cut ends the stream at once. Only the first reason counts.
func (s *stream) cut(reason string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.cutLocked(reason)
}

// writableLocked reports whether the stream is open and drain does not run.
func (s *stream) writableLocked() bool { return s.state == streamOpen && len(s.pending) == 0 }

// writeLocked writes what the socket takes of chunk, and starts drain if there is anything left to do.
func (s *stream) writeLocked(chunk []byte) {
	n, err := writeNow(s.raw, chunk)
	if err != nil {
		s.cutLocked(streamError)
		return
	}
	s.written += uint64(n)
	if n < len(chunk) || s.state == streamOverflowed {
		s.enqueueLocked(chunk[n:])
		go s.drain()
	}
}

func (s *stream) enqueueLocked(chunk []byte) {
	need := len(s.pending) + len(chunk)
	switch {
	case need <= s.cfg.StreamBuffer, len(s.pending) == 0: // one event may be larger
		if need > cap(s.pending) { // append would grow it in small steps, and leave megabytes to the garbage collector
			most := s.cfg.StreamBuffer + s.cfg.StreamBuffer/4 // or a nearly full one would be copied at each write of drain
			s.pending = append(make([]byte, 0, max(need, min(need+len(s.pending), most))), s.pending...)
		}
		s.pending = append(s.pending, chunk...)
	default:
		s.state = streamOverflowed
		if s.conn != nil {
			s.conn.SetWriteDeadline(time.Now().Add(s.timeoutLocked()))
		}
	}
}

func (s *stream) finishLocked() {
	s.state = max(s.state, streamEnding)
	if s.state > streamEnding || s.conn == nil || len(s.pending) > 0 {
		return // it has ended, or open or drain comes back to it
	}
	if s.chunked {
		writeNow(s.raw, []byte(lastChunk)) // if the socket has no room for 5 bytes, the stream ends nevertheless
	}
	s.cutLocked(serverClosed)
}

func (s *stream) cutLocked(reason string) {
	if s.state == streamEnded {
		return
	}
	s.state, s.reason, s.pending = streamEnded, reason, nil
	if s.lifetime != nil {
		s.lifetime.Stop()
	}
	if tcp, ok := s.conn.(interface{ SetLinger(seconds int) error }); ok && reason == streamError && unacknowledged(s.raw) > 0 {
		tcp.SetLinger(0) // drop what the socket holds, megabytes that the client does not take
	}
	if s.conn != nil {
		s.conn.Close() // wakes watch, which tells the backend
	}
}

// A client whose buffer has overflowed is sent what was accepted before, unless it takes nothing for overflowTimeout,
// and then its stream ends. If the stream were cut at once, the client would come back for the same again.
const (
	overflowTimeout = time.Second
	overflowPause   = overflowTimeout / 20 // between two looks at what it took
)

// drainWrite is how many bytes drain writes at once: enough for speed, and few enough that the room in the buffer is
// soon seen.
const drainWrite = 64 << 10

// drain writes pending until nothing is left, and ends the stream if that is due. A write that misses its deadline is
// repeated unless the client is stuck: it may have acknowledged bytes, but not enough for the socket to have room.
func (s *stream) drain() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.stuckLocked() // notes where the client is: its time counts from there
	for len(s.pending) > 0 {
		s.conn.SetWriteDeadline(time.Now().Add(s.timeoutLocked()))
		part := s.pending[:min(len(s.pending), drainWrite)]
		s.mu.Unlock()
		n, err := s.conn.Write(part)
		s.mu.Lock()
		if s.state == streamEnded {
			return
		}
		s.pending = s.pending[n:]
		s.written += uint64(n)
		stuck := s.stuckLocked()
		if err != nil && (stuck || !errors.Is(err, os.ErrDeadlineExceeded)) {
			s.cutLocked(streamError)
		}
	}
	s.pending = nil // an empty slice would keep its array
	for s.state == streamOverflowed && unacknowledged(s.raw) > 0 && !s.stuckLocked() {
		s.mu.Unlock()
		time.Sleep(overflowPause)
		s.mu.Lock()
	}
	switch s.state {
	case streamOverflowed:
		s.cutLocked(streamError) // without the last chunk, as something is missing
	case streamEnding:
		s.finishLocked()
	}
}

// nowWriter is a write that does not wait for the socket. RawConn takes a function; writers are pooled so that an event
// allocates none.
type nowWriter struct {
	buf []byte
	n   int
	err error
	do  func(fd uintptr)
}

var nowWriters = sync.Pool{New: func() any {
	w := &nowWriter{}
	w.do = func(fd uintptr) {
		for {
			w.n, w.err = syscall.Write(int(fd), w.buf)
			if w.err != syscall.EINTR {
				return
			}
		}
	}
	return w
}}

// writeNow writes as much of buf as the socket takes without waiting.
func writeNow(raw syscall.RawConn, buf []byte) (int, error) {
	w := nowWriters.Get().(*nowWriter)
	defer nowWriters.Put(w)
	w.buf = buf
	err := raw.Control(w.do) // not raw.Write, which minds the deadline that drain has set
	w.buf = nil
	switch {
	case err != nil:
		return 0, err
	case w.err == syscall.EAGAIN:
		return 0, nil
	}
	return w.n, w.err
}

// jitter returns a duration between low and high.
func jitter(low, high time.Duration) time.Duration {
	return low + rand.N(high-low+1)
}
