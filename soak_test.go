package main

import (
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"testing"
	"time"
)

// TestSoak mixes all that a gateway may meet, for SIDECAST_SOAK (a duration, 2s by default). Nothing may be left of it:
// no stream, goroutine, descriptor or memory. The metrics must agree, and the backend must know of every end.
//
// A run of more than a few minutes needs -timeout, too. With SIDECAST_SOAK set, it prints what it did and left behind.
func TestSoak(t *testing.T) {
	t.Parallel()
	length, tell := 2*time.Second, t.Log
	if text := os.Getenv("SIDECAST_SOAK"); text != "" {
		var err error
		length, err = time.ParseDuration(text)
		must(t, err)
		tell = func(report ...any) { fmt.Println(report...) } // go test shows no log of a test that passes
	}
	s := newSoak(t)
	s.stall() // so that what is allocated once is there
	s.wait("the first stream has ended", func() bool { return s.metric("gateway_streams") == 0 })
	began := s.left()

	acts := []func(){s.visit, s.visit, s.send, s.send, s.stall, s.misbehave}
	end := time.Now().Add(length)
	var clients sync.WaitGroup
	for range 8 {
		clients.Go(func() {
			for time.Now().Before(end) {
				acts[rand.IntN(len(acts))]()
			}
		})
	}
	clients.Wait()

	s.wait("all streams have ended", func() bool { return s.metric("gateway_streams") == 0 })
	opened, closed := s.metric("gateway_streams_opened_total"), 0.0
	for _, reason := range []string{clientClosed, serverClosed, streamError} {
		n := s.metric(fmt.Sprintf("gateway_streams_closed_total{reason=%q}", reason))
		closed += n
		if n == 0 {
			t.Errorf("no stream ended with reason %s", reason)
		}
	}
	if opened != closed {
		t.Errorf("%v streams opened and %v closed, want the same number", opened, closed)
	}
	var now soakLeft
	defer func() {
		tell(fmt.Sprintf("%v: %.0f streams opened, %.0f closed\nleft before: %v\nleft after:  %v", length, opened, closed, began, now))
	}()
	s.wait("goroutines, descriptors and heap are back where they began", func() bool {
		now = s.left()
		return now.goroutines <= began.goroutines && now.descriptors <= began.descriptors && now.heap <= began.heap+1<<20 &&
			now.streams == 0 && now.unended == 0
	})
}

// soakLeft is what a gateway holds.
type soakLeft struct {
	goroutines, descriptors, heap, resident, streams float64
	unended                                          int // streams that go on as far as the backend knows
}

func (l soakLeft) String() string {
	return fmt.Sprintf("%.0f goroutines, %.0f descriptors, %.1f MiB of heap, %.1f MiB resident, %.0f streams, %d unended at the backend",
		l.goroutines, l.descriptors, l.heap/(1<<20), l.resident/(1<<20), l.streams, l.unended)
}

func (s *soak) left() soakLeft {
	s.mu.Lock()
	unended := len(s.accepted)
	s.mu.Unlock()
	return soakLeft{
		goroutines:  s.metric("go_goroutines"),
		descriptors: s.metric("process_open_fds"),
		heap:        s.metric("go_memstats_heap_alloc_bytes"),
		resident:    s.metric("process_resident_memory_bytes"),
		streams:     s.metric("gateway_streams"),
		unended:     unended,
	}
}

// soak is a gateway process, its backend, and what its clients do. Unlike a stubBackend, it forgets streams that have
// ended, so it can run for any time.
type soak struct {
	t       *testing.T
	gateway *process
	client  *http.Client
	lately  chan string // tokens of streams opened lately; those that do not fit are dropped

	mu       sync.Mutex
	accepted map[string]bool // tokens of streams that have not ended
}

func newSoak(t *testing.T) *soak {
	s := &soak{
		t:        t,
		client:   &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}, // its descriptors would be counted
		lately:   make(chan string, 100),
		accepted: map[string]bool{},
	}
	backend := serveTest(t, http.HandlerFunc(s.callback))
	s.gateway = startOwnGateway(t, "CALLBACK_URL="+backend.URL+callbackTarget, "HEARTBEAT_INTERVAL_SECONDS=0.2",
		"WRITE_TIMEOUT_SECONDS=0.5", "STREAM_BUFFER_BYTES=65536", "MAX_STREAM_SECONDS=1")
	return s
}

// callback takes the gateway's callbacks. It accepts every stream.
func (s *soak) callback(_ http.ResponseWriter, r *http.Request) {
	var c callbackCall
	if err := json.NewDecoder(r.Body).Decode(&c); err != nil {
		s.t.Errorf("reading a callback: %v", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if c.Action == "disconnect" {
		if !s.accepted[c.Token] {
			s.t.Error("a disconnect callback of a stream that has ended, or never was")
		}
		delete(s.accepted, c.Token)
		return
	}
	s.accepted[c.Token] = true
	select {
	case s.lately <- c.Token:
	default:
	}
}

// with sends text on a connection of its own, which it then gives to use.
func (s *soak) with(text string, use func(conn net.Conn)) {
	conn, err := (&net.Dialer{Control: smallSocket}).Dial("tcp", address(s.gateway))
	if err != nil {
		s.t.Error(err)
		return
	}
	defer conn.Close()
	io.WriteString(conn, text)
	use(conn)
}

const soakRequest = "GET /soak HTTP/1.1\r\nHost: h\r\nAccept: text/event-stream\r\n\r\n"

// visit opens a stream, reads for a while, and leaves, with a reset or without. Sometimes it stays to the end.
func (s *soak) visit() {
	s.with(soakRequest, func(conn net.Conn) {
		if rand.IntN(50) > 0 {
			conn.SetReadDeadline(time.Now().Add(rand.N(50 * time.Millisecond)))
		}
		io.Copy(io.Discard, conn)
		if rand.IntN(2) == 0 {
			conn.(*net.TCPConn).SetLinger(0)
		}
	})
}

// send posts to a stream that was opened lately, and perhaps ends it.
func (s *soak) send() {
	select {
	case token := <-s.lately:
		s.post(fmt.Sprintf(`{"token":%q,"event":{"data":"x"},"close":%t}`, token, rand.IntN(2) == 0))
	default:
		s.post(`{"token":"nobody","event":{"data":"x"}}`)
	}
}

func (s *soak) post(body string) (status int) {
	resp, err := s.client.Post(s.gateway.URL+"/internal/send", "application/json", strings.NewReader(body))
	if err != nil {
		s.t.Error(err)
		return 0
	}
	resp.Body.Close()
	return resp.StatusCode
}

// stall opens a stream, reads nothing, and sends more to it than may wait.
func (s *soak) stall() {
	s.with(soakRequest, func(net.Conn) {
		select {
		case token := <-s.lately: // perhaps of another client, which does no harm
			big := fmt.Sprintf(`{"token":%q,"event":{"data":%q}}`, token, strings.Repeat("x", 60<<10))
			for s.post(big) == http.StatusOK {
			}
		case <-time.After(time.Second):
		}
	})
}

// misbehave sends what no browser or backend sends.
func (s *soak) misbehave() {
	bad := []string{
		"", "GET", "GET / HTTP/1.1\r\n", "\x00\x01\x02\r\n\r\n", "GET / HTTP/9.9\r\n\r\n",
		"POST /soak HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\n\r\nhello",
		soakRequest + "and more", soakRequest + soakRequest,
		"POST /internal/send HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{",
		sendText("application/json", []byte("null")) + sendText("application/json", []byte(`{"token":""}`)),
		sendText("application/x-ndjson", []byte("{}\n\n\"\"\n")), sendText("text/plain", nil),
		"GET /" + strings.Repeat("x", 40<<10) + " HTTP/1.1\r\nHost: h\r\n\r\n",
	}
	s.with(bad[rand.IntN(len(bad))], func(conn net.Conn) {
		conn.SetReadDeadline(time.Now().Add(10 * time.Millisecond))
		io.Copy(io.Discard, conn)
	})
}

func (s *soak) metric(series string) float64 {
	return scrapeValue(scrapeURL(s.client, s.gateway.URL), series)
}

// wait waits for longer than the gateway keeps idle connections to the backend.
func (s *soak) wait(what string, cond func() bool) {
	s.t.Helper()
	eventually(s.t, 20*time.Second, what, cond)
}
