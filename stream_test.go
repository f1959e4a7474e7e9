package main

import (
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// muchData returns the data of events of 16 KiB each. Together they are many times what the sockets between the gateway
// and a client take.
func muchData() []string {
	data := make([]string, 64)
	for i := range data {
		data[i] = strconv.Itoa(i) + strings.Repeat("x", 16<<10)
	}
	return data
}

// An event is one chunk, and its size must be right to the byte. HTTP/1.0 has no chunks.
func TestFraming(t *testing.T) {
	t.Parallel()
	g := newGatewayFixture(t, "RETRY_MILLISECONDS=2", nil)
	for _, tt := range []struct {
		request   string
		frame     func(text string) string
		wantAtEnd string
	}{
		{"GET /x HTTP/1.1\r\nHost: h\r\n\r\n", func(s string) string { return fmt.Sprintf("%x\r\n%s\r\n", len(s), s) }, "0\r\n\r\n"},
		{"GET /x HTTP/1.0\r\n\r\n", func(s string) string { return s }, ""},
	} {
		c := g.asked(g.dial(tt.request))
		token := c.callback.Token
		c.answer()
		want := []string{tt.frame("retry: 2\n"), tt.frame("retry: 3\n"), tt.frame("retry: 4\n")}
		if got := c.wireString(len(want[0])); !slices.Contains(want, got) {
			t.Errorf("%q: got %q, want one of %q", tt.request, got, want)
		}
		for _, size := range []int{8, 15, 16, 255, 256, 4095, 4096, 65535, 65536, 1 << 19} {
			data := strings.Repeat("x", size-len("data: \n\n"))
			g.send(token, data)
			want := tt.frame("data: " + data + "\n\n")
			if got := c.wireString(len(want)); got != want {
				t.Errorf("%q: event of %d bytes: got %.20q… of %d bytes, want %.20q… of %d", tt.request, size, got, len(got), want, len(want))
			}
		}
		g.end(token)
		if got, err := io.ReadAll(c.wire); err != nil || string(got) != tt.wantAtEnd {
			t.Errorf("%q: got %q, %v at the end, want %q", tt.request, got, err, tt.wantAtEnd)
		}
	}
}

// wireString reads n bytes as they came.
func (c *streamClient) wireString(n int) string {
	text := make([]byte, n)
	n, _ = io.ReadFull(c.wire, text)
	return string(text[:n])
}

// Events that the socket does not take are written later by another goroutine. The order must hold, even when the work
// passes from one goroutine to the other.
func TestSlowClientGetsEverything(t *testing.T) {
	t.Parallel()
	g := newGatewayFixture(t, "STREAM_BUFFER_BYTES=4194304 WRITE_TIMEOUT_SECONDS=60", nil)
	c := g.open("/x")
	data := muchData()
	send := func() {
		for _, d := range data {
			g.wantSend(c, d, sentOK)
		}
	}
	send() // while the client reads nothing
	var sender sync.WaitGroup
	t.Cleanup(sender.Wait)
	sender.Go(send) // while it reads
	c.wantData(data...)
	c.wantData(data...)
	sender.Wait()
	g.wantLive(c)

	// The end comes after everything else, however long that takes.
	send()
	g.wantAnswers(sentOK, g.end(c.callback.Token))
	g.wantSend(c, "late", sentGone)
	c.wantData(data...)
	c.wantEnd()
	g.wantDisconnect(c, "server_closed")
}

// overflow sends events of 16 KiB until one is refused. It returns what was accepted, and when that one was sent.
func (g *gatewayFixture) overflow(c *streamClient) (accepted []string, at time.Time) {
	g.t.Helper()
	for i := range 1000 {
		data := strconv.Itoa(i) + strings.Repeat("x", 16<<10)
		at = time.Now()
		switch got := g.send(c.callback.Token, data); got {
		case sentOK:
			accepted = append(accepted, data)
		case sentGone:
			return accepted, at
		default:
			g.t.Fatalf("event %d: got %s", i, got)
		}
	}
	g.t.Fatal("all events were accepted, want some refused")
	return nil, at
}

// A client that does not read may keep its buffer for a second, and must not affect other clients.
func TestBufferOverflowCutsTheStream(t *testing.T) {
	t.Parallel()
	g := newGatewayFixture(t, "STREAM_BUFFER_BYTES=65536", nil)
	c, other := g.open("/x"), g.open("/x")
	accepted, at := g.overflow(c)
	if n := len(accepted); n >= len(muchData()) {
		t.Errorf("%d events were accepted, want fewer", n)
	}
	g.wantDisconnect(c, "error")
	if took := time.Since(at); took < overflowTimeout/2 || took > 5*overflowTimeout {
		t.Errorf("cut after %v, want %v", took, overflowTimeout)
	}
	if _, err := c.rest(); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the client got %v, want a reset: nothing is left for it", err)
	}
	g.wantLive(other)
	g.waitMetric(`gateway_streams_closed_total{reason="error"}`, 1)
	g.waitMetric("gateway_streams", 1)
}

// The limit of a second also applies to a write that began earlier with the longer write timeout. With a large buffer
// there always is one.
func TestBufferOverflowOfALargeBuffer(t *testing.T) {
	t.Parallel()
	g := newGatewayFixture(t, "STREAM_BUFFER_BYTES=4194304", nil)
	c := g.open("/x")
	_, at := g.overflow(c)
	g.wantDisconnect(c, "error")
	if took := time.Since(at); took > 3*overflowTimeout { // 4.7 s with the deadline of the earlier write
		t.Errorf("cut after %v, want %v", took, overflowTimeout)
	}
}

// A client gets the events accepted before its stream began, or it would come back for the same events forever.
func TestBufferOverflowDuringCallback(t *testing.T) {
	t.Parallel()
	gate := make(chan struct{})
	g := newGatewayFixture(t, "STREAM_BUFFER_BYTES=1024", holding("connect", gate, answering(200, "")))
	c := g.asked(g.get("/x"))
	for _, want := range []string{sentBuffered, sentGone, sentGone} {
		g.wantSend(c, strings.Repeat("x", 600), want)
	}
	close(gate)
	c.begin()
	c.wantData(strings.Repeat("x", 600))
	c.wantCut()
	g.wantDisconnect(c, "error")
	g.waitMetric("gateway_streams", 0)
}

// An event that is larger than the buffer must not end one stream after the other.
func TestEventLargerThanTheBuffer(t *testing.T) {
	t.Parallel()
	gate := make(chan struct{})
	g := newGatewayFixture(t, "STREAM_BUFFER_BYTES=1024", holding("connect", gate, answering(200, "")))
	c := g.asked(g.get("/x"))
	large := strings.Repeat("x", 1000<<10) // the socket takes part of it
	g.wantSend(c, large, sentBuffered)
	g.wantAnswers(sentBuffered, g.probe(c.callback.Token), g.end(c.callback.Token)) // these need no room
	close(gate)
	c.begin()
	c.wantData(large)
	c.wantEnd()

	c = g.open("/x")
	g.wantSend(c, large, sentOK)
	c.wantData(large)
}

// A client that reads gets every accepted event. If it lost those under way, it would come back forever.
func TestBufferOverflowKeepsWhatWasAccepted(t *testing.T) {
	t.Parallel()
	g := newGatewayFixture(t, "STREAM_BUFFER_BYTES=65536", nil)
	c := g.open("/x")
	accepted, _ := g.overflow(c)
	c.wantData(accepted...)
	c.wantCut()
	g.wantDisconnect(c, "error")
}

func TestWriteTimeoutCutsTheStream(t *testing.T) {
	t.Parallel()
	g := newGatewayFixture(t, "WRITE_TIMEOUT_SECONDS=0.5 STREAM_BUFFER_BYTES=4194304", nil)
	c := g.open("/x")
	began := time.Now()
	for _, d := range muchData() {
		g.send(c.callback.Token, d)
	}
	g.wantDisconnect(c, "error")
	if took := time.Since(began); took < 500*time.Millisecond {
		t.Errorf("cut after %v, want 0.5 s", took)
	}
	g.wantSend(c, "late", sentGone)
	c.wantCut()
}

// The limit is for each write, not for the stream.
func TestStreamOutlivesTheWriteTimeout(t *testing.T) {
	t.Parallel()
	const timeout = time.Second
	g := newGatewayFixture(t, "WRITE_TIMEOUT_SECONDS=1", nil)
	c := g.open("/x")
	data := muchData()[:24] // enough to make the gateway wait for the client once
	var sending sync.WaitGroup
	sending.Go(func() { // while the client reads: on a busy machine it takes longer than the limit
		for _, d := range data {
			g.send(c.callback.Token, d)
		}
	})
	c.wantData(data...)
	sending.Wait()
	time.Sleep(timeout * 5 / 4)
	g.wantLive(c)
}

// The limit is for a client that takes nothing. One that reads slowly but steadily keeps its stream, even if its socket
// has no room for many times the limit.
func TestSlowReaderIsKept(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	defer l.Close()
	client, err := (&net.Dialer{Control: smallSocket}).Dial("tcp", l.Addr().String())
	must(t, err)
	defer client.Close()
	conn, err := l.Accept()
	must(t, err)
	conn.(*net.TCPConn).SetWriteBuffer(1 << 20) // has room again when some 700 KiB of it are free
	const timeout = 2 * time.Second             // on a busy machine the client may not get to read for a while
	s := &stream{cfg: &gatewayConfig{StreamBuffer: 4 << 20, WriteTimeout: timeout}}
	s.open(conn, []byte("head"), false)
	defer s.cut(serverClosed)
	s.send(make([]byte, 4<<20), false)
	for began := time.Now(); time.Since(began) < timeout*5/2; time.Sleep(timeout / 40) {
		if _, err := io.CopyN(io.Discard, client, 8<<10); err != nil {
			t.Fatalf("after %v: %v", time.Since(began), err)
		}
	}
	if got := s.send([]byte("live"), false); got != sendWritten {
		t.Errorf("got %v, want %v", got, sendWritten)
	}
}

// The limit also applies to data in the gateway's socket buffer when no write follows. A client that acknowledges none
// of it is taken to have left.
func TestClientThatAcknowledgesNothing(t *testing.T) {
	t.Parallel()
	g := newGatewayFixture(t, "WRITE_TIMEOUT_SECONDS=0.3", nil)
	c := g.open("/x")
	for _, d := range muchData()[:8] { // more than its window, less than the gateway's socket takes
		g.wantSend(c, d, sentOK)
	}
	g.wantDisconnect(c, "error")
}

func TestConcurrentSenders(t *testing.T) {
	t.Parallel()
	const senders, events = 6, 60
	g := newGatewayFixture(t, "STREAM_BUFFER_BYTES=4194304", nil)
	c := g.open("/x")
	padding := strings.Repeat("x", 4<<10) // all together are more than the sockets take
	var all sync.WaitGroup
	for sender := range senders {
		all.Go(func() {
			for i := range events {
				if got := g.send(c.callback.Token, fmt.Sprint(sender, " ", i, " ", padding)); got != sentOK {
					t.Errorf("got %s, want %s", got, sentOK)
				}
			}
		})
	}
	all.Wait()
	var next [senders]int
	for range senders * events {
		var sender, i int
		if _, err := fmt.Sscanf(c.event(), "data: %d %d "+padding, &sender, &i); err != nil || i != next[sender] {
			t.Fatalf("sender %d: got event %d, %v; want %d", sender, i, err, next[sender])
		}
		next[sender]++
	}
}

// When a client is looked at, it may not have had time to acknowledge an event: the first, or one after a long pause.
func TestUptake(t *testing.T) {
	t.Parallel()
	var u uptake
	began := time.Now()
	for _, step := range []struct {
		seconds int
		taken   uint64
		lacks   bool
		want    bool
	}{
		{0, 0, true, false}, // the head has just been sent
		{15, 100, false, false},
		{30, 100, true, false}, // an event has just been sent
		{45, 200, true, false}, // that one was taken, another was just sent
		{54, 200, true, false},
		{55, 200, true, true},
		{56, 201, true, false},
		{66, 201, true, true},
	} {
		if got := u.stuck(step.taken, step.lacks, began.Add(time.Duration(step.seconds)*time.Second), 10*time.Second); got != step.want {
			t.Errorf("%+v: got %v", step, got)
		}
	}
}

// Bytes that drain is writing count as buffered.
func TestStreamBufferCountsWhatIsBeingWritten(t *testing.T) {
	t.Parallel()
	conn, other := net.Pipe()
	defer conn.Close()
	defer other.Close()
	s := &stream{cfg: &gatewayConfig{StreamBuffer: 1000, WriteTimeout: time.Second}, state: streamOpen, conn: conn, pending: make([]byte, 600)}
	for _, want := range []sendStatus{sendWritten, sendUnknown, sendUnknown} {
		if got := s.send(make([]byte, 300), false); got != want {
			t.Errorf("got %v, want %v", got, want)
		}
	}
	if len(s.pending) != 900 || s.state != streamOverflowed {
		t.Errorf("%d bytes wait in state %d, want 900", len(s.pending), s.state)
	}
}
