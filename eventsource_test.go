package main

import (
	"bytes"
	"context"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// The client that matters is a browser, so tests of streams use one. This file follows WHATWG HTML 9.2 "Server-sent
// events", whose section numbers it cites, and shares no code with the product.

// A message is a dispatched event (9.2.6). Name is "message" when the event had none.
type message struct {
	ID, Name, Data string // ID is the last event ID string at dispatch
}

// A parser interprets one event stream (9.2.6) in pieces of any size; its zero value is ready. What follows the last
// blank line is never dispatched, as the section requires for the end of a stream.
type parser struct {
	lastEventID string         // last event ID string; changes only on dispatch
	retry       *time.Duration // the latest reconnection time that the stream has set; nil: none

	line           []byte // so far
	afterCR        bool   // an LF that comes now belongs to the CR before it
	begun          bool   // past the first line, the only one that may begin with a BOM
	data, name, id string // data, event type and last event ID buffers
}

// feed returns the messages that piece completes. A CR ends its line at once, as the next byte may take long to come.
func (p *parser) feed(piece []byte) (dispatched []message) {
	for _, b := range piece {
		secondHalf := b == '\n' && p.afterCR
		p.afterCR = b == '\r'
		switch {
		case secondHalf:
			continue
		case b != '\n' && b != '\r':
			p.line = append(p.line, b)
			continue
		case !p.begun:
			p.begun = true
			p.line = bytes.TrimPrefix(p.line, []byte("\uFEFF"))
		}
		// Lines can be decoded one by one, as UTF-8 uses CR and LF for nothing else. A browser may write several U+FFFD
		// for the bad bytes that become one here.
		line := strings.ToValidUTF8(string(p.line), "\uFFFD")
		p.line = p.line[:0]
		if line != "" {
			p.field(line)
		} else if m, ok := p.dispatch(); ok {
			dispatched = append(dispatched, m)
		}
	}
	return dispatched
}

// field processes a line that is not blank. A comment has an empty name, which is ignored like any unknown name.
func (p *parser) field(line string) {
	name, value, _ := strings.Cut(line, ":")
	value = strings.TrimPrefix(value, " ")
	switch name {
	case "event":
		p.name = value
	case "data":
		p.data += value + "\n"
	case "id":
		if !strings.Contains(value, "\x00") {
			p.id = value
		}
	case "retry":
		if value != "" && strings.Trim(value, "0123456789") == "" {
			ms, _ := strconv.ParseInt(value, 10, 32) // at most 24 days
			retry := time.Duration(ms) * time.Millisecond
			p.retry = &retry
		}
	}
}

// dispatch does what a blank line asks for. The last event ID changes even without data and thus without a message.
func (p *parser) dispatch() (m message, ok bool) {
	p.lastEventID = p.id
	m, ok = message{p.id, p.name, strings.TrimSuffix(p.data, "\n")}, p.data != ""
	if m.Name == "" {
		m.Name = "message"
	}
	p.data, p.name = "", ""
	return m, ok
}

// An eventSource is the EventSource of a browser (9.2.2): it connects in the background, comes back with Last-Event-ID
// when the network fails or the stream ends, and gives up on any answer but an event stream. As in a browser, an answer
// has no time limit but the end of the test. Any goroutine may call its methods.
type eventSource struct {
	request    *http.Request // cloned for each attempt
	retryScale float64       // applied to the reconnection times that streams set
	cancel     context.CancelFunc
	done       chan struct{} // closed when it will not connect any more

	mu       sync.Mutex         // guards what follows
	dropConn context.CancelFunc // makes the current attempt a network error
	now      sourceState
}

// A sourceState is what a test may ask about an eventSource.
type sourceState struct {
	readyState string    // connecting, open or closed
	attempts   int       // connections tried; a redirect is part of its attempt
	opens      int       // attempts that were answered with an event stream
	http       int       // version of HTTP of the latest of these, 1 or 2
	failure    int       // status of the answer for which it gave up, 0 if it did not
	events     []message // of all connections
}

// longestDelay is the longest that an eventSource waits before it comes back. A stream that ends asks for up to 20 s.
const longestDelay = 500 * time.Millisecond

// retryScale is an option that scales the reconnection times that streams set, as they are too long for tests.
func retryScale(factor float64) func(*eventSource) {
	return func(s *eventSource) { s.retryScale = factor }
}

// openEventSource connects to url until the test ends. Close the server in t.Cleanup, not by defer: it may wait for
// its streams to end.
func openEventSource(t testing.TB, url string, opts ...func(*eventSource)) *eventSource {
	t.Helper()
	req, err := http.NewRequest(http.MethodGet, url, nil)
	must(t, err)
	req.Header.Set("Accept", "text/event-stream")
	req.Header.Set("Cache-Control", "no-cache") // what browsers send for the cache mode of 9.2.2
	ctx, cancel := context.WithCancel(context.Background())
	s := &eventSource{request: req, retryScale: 1, cancel: cancel, done: make(chan struct{}), dropConn: func() {}}
	s.now.readyState = "connecting"
	for _, opt := range opts {
		opt(s)
	}
	go s.run(ctx)
	t.Cleanup(func() {
		s.close()
		if t.Failed() {
			t.Logf("event source of %s: %+v", url, s.look())
		}
	})
	return s
}

// run implements the processing model (9.2.3): it connects, and reconnects after a pause, until it fails or is closed.
func (s *eventSource) run(ctx context.Context) {
	defer close(s.done)
	defer s.update(func(now *sourceState) { now.readyState = "closed" })
	delay := 100 * time.Millisecond // a few seconds in a browser
	lastEventID := ""
	for {
		// According to 9.2.6 the buffers of each new stream are empty, so its first blank line clears the last event ID
		// unless an id came before. Some browsers begin with the ID that they have, but streams must not rely on that.
		p := &parser{lastEventID: lastEventID}
		if status := s.connect(ctx, p); status != 0 {
			s.update(func(now *sourceState) { now.failure = status })
			return
		}
		s.update(func(now *sourceState) { now.readyState = "connecting" })
		lastEventID = p.lastEventID
		if p.retry != nil {
			delay = min(time.Duration(float64(*p.retry)*s.retryScale), longestDelay)
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(delay):
		}
	}
}

// connect makes one attempt and returns when its stream is over: 0 to reestablish the connection, or the status of an
// answer that fails it (9.2.3). Each attempt has its own TCP connection, whatever happened to an earlier one.
func (s *eventSource) connect(ctx context.Context, p *parser) (failure int) {
	ctx, drop := context.WithCancel(ctx)
	defer drop()
	s.update(func(now *sourceState) { now.attempts++; s.dropConn = drop })
	req := s.request.Clone(ctx)
	if p.lastEventID != "" {
		req.Header.Set("Last-Event-ID", p.lastEventID) // 9.2.4
	}
	transport := &http.Transport{}
	defer transport.CloseIdleConnections()
	resp, err := (&http.Client{Transport: transport}).Do(req)
	if err != nil {
		return 0
	}
	defer resp.Body.Close()
	mediaType, _, _ := strings.Cut(resp.Header.Get("Content-Type"), ";")
	if resp.StatusCode != http.StatusOK || !strings.EqualFold(strings.TrimSpace(mediaType), "text/event-stream") {
		return resp.StatusCode
	}
	s.update(func(now *sourceState) {
		now.opens++
		now.http = resp.ProtoMajor
		if ctx.Err() == nil { // not cut meanwhile
			now.readyState = "open"
		}
	})
	for buf := make([]byte, 4096); ; {
		n, err := resp.Body.Read(buf)
		s.update(func(now *sourceState) {
			if ctx.Err() == nil {
				now.events = append(now.events, p.feed(buf[:n])...)
			}
		})
		if err != nil {
			return 0
		}
	}
}

func (s *eventSource) update(change func(now *sourceState)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	change(&s.now)
}

func (s *eventSource) look() sourceState {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.now
}

func (s *eventSource) state() string     { return s.look().readyState }
func (s *eventSource) attempts() int     { return s.look().attempts }
func (s *eventSource) opens() int        { return s.look().opens }
func (s *eventSource) failure() int      { return s.look().failure }
func (s *eventSource) events() []message { return slices.Clone(s.look().events) }

// cut drops the current connection at once, as a failing network does: no event arrives on it any more, and the
// eventSource reconnects by itself.
func (s *eventSource) cut() {
	s.update(func(now *sourceState) {
		s.dropConn()
		if now.readyState == "open" {
			now.readyState = "connecting"
		}
	})
}

// close ends the eventSource for good and returns when it is over.
func (s *eventSource) close() {
	s.cancel()
	<-s.done
}

// waitFor waits until cond holds for all events so far, and returns them.
func (s *eventSource) waitFor(t testing.TB, limit time.Duration, cond func([]message) bool) (got []message) {
	t.Helper()
	eventually(t, limit, "the wanted events", func() bool { got = s.events(); return cond(got) })
	return got
}

// waitClosed waits until the eventSource has given up or was closed, and returns failure.
func (s *eventSource) waitClosed(t testing.TB, limit time.Duration) int {
	t.Helper()
	eventually(t, limit, "event source closed", func() bool { return s.state() == "closed" })
	return s.failure()
}

// A stream means the same wherever the network splits it.
func TestParser(t *testing.T) {
	type messages []message
	for _, tt := range []struct {
		name, stream string
		want         messages
		lastEventID  string
		retry        time.Duration // 0: never set
	}{
		// The examples of 9.2.1 and 9.2.6.
		{"named", "event: add\ndata: 7\n\nevent: del\ndata: 2\n\n", messages{{"", "add", "7"}, {"", "del", "2"}}, "", 0},
		{"lines", "data: YHOO\ndata: +2\ndata: 10\n\n", messages{{"", "message", "YHOO\n+2\n10"}}, "", 0},
		{"four blocks", ": test stream\n\ndata: first\nid: 1\n\ndata:second\nid\n\ndata:  third\n\n",
			messages{{"1", "message", "first"}, {"", "message", "second"}, {"", "message", " third"}}, "", 0},
		{"empty data", "data\n\ndata\ndata\n\ndata:", messages{{"", "message", ""}, {"", "message", "\n"}}, "", 0},
		{"one space", "data:test\n\ndata: test\n\n", messages{{"", "message", "test"}, {"", "message", "test"}}, "", 0},
		// Less obvious rules.
		{"line ends", "data:1\rdata:2\r\ndata:3\n\rdata:4\r\n\r\ndata:5\r\r\n\n",
			messages{{"", "message", "1\n2\n3"}, {"", "message", "4"}, {"", "message", "5"}}, "", 0},
		{"one BOM", "\uFEFFdata:1\n\n\uFEFFdata:2\n\n", messages{{"", "message", "1"}}, "", 0},
		{"two BOMs", "\uFEFF\uFEFFdata:1\n\n", nil, "", 0},
		{"bad UTF-8", "data:\xff\xe2\x82\ndata:é\uFEFF\n\n", messages{{"", "message", "\uFFFD\né\uFEFF"}}, "", 0},
		{"unknown fields", "Data:1\n data:2\ndata :3\nfoo\ndata:a:b\n\n", messages{{"", "message", "a:b"}}, "", 0},
		{"lost names", "event:a\n\nevent:b\nevent\ndata:1\n\n", messages{{"", "message", "1"}}, "", 0},
		{"id stays", "id:1\n\ndata:1\n\ndata:2\n\n", messages{{"1", "message", "1"}, {"1", "message", "2"}}, "1", 0},
		{"id with NUL", "id:1\nid:2\x00\ndata:1\n\n", messages{{"1", "message", "1"}}, "1", 0},
		{"incomplete event", "id:1\n\nid:2\ndata:2\n", nil, "1", 0},
		{"bad retry", "retry:7\nretry\nretry:1.5\nretry:-1\nretry:+1\nretry:  1\n", nil, "", 7 * time.Millisecond},
		{"huge retry", "retry:99999999999999999999\n", nil, "", (1<<31 - 1) * time.Millisecond},
	} {
		t.Run(tt.name, func(t *testing.T) {
			for i := range len(tt.stream) {
				p := parser{retry: new(time.Duration)}
				got := append(p.feed([]byte(tt.stream[:i])), p.feed([]byte(tt.stream[i:]))...)
				if !slices.Equal(got, tt.want) || p.lastEventID != tt.lastEventID || *p.retry != tt.retry {
					t.Fatalf("split at %d: got %q, last event ID %q, retry %v", i, got, p.lastEventID, *p.retry)
				}
			}
		})
	}
}

// scriptedServer answers its n-th request with the n-th handler and sends each Last-Event-ID to the channel.
func scriptedServer(t *testing.T, handlers ...http.HandlerFunc) (url string, lastEventIDs <-chan string) {
	next, asked := make(chan http.HandlerFunc, len(handlers)), make(chan string, len(handlers))
	for _, h := range handlers {
		next <- h
	}
	srv := serveTest(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked <- r.Header.Get("Last-Event-ID")
		(<-next)(w, r)
	}))
	return srv.URL, asked
}

// streamThat sends text and ends, or with hold keeps the stream open until the client leaves.
func streamThat(text string, hold bool) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "Text/Event-Stream ;charset=utf-8; odd")
		fmt.Fprint(w, text)
		w.(http.Flusher).Flush()
		if hold {
			<-r.Context().Done()
		}
	}
}

// The product is built on this: whatever breaks a stream, the browser comes back with the ID of the last event that it
// got whole.
func TestEventSourceResumes(t *testing.T) {
	url, lastEventIDs := scriptedServer(t,
		func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }, // a network error before any answer
		streamThat("id: 1\ndata: a\n\nid: 2\ndata: incomplete", false),
		streamThat("retry: 6000\nid: 2\ndata: b\n\n", true),
		streamThat("retry: 1\n: no blank line, which would forget the ID\n", false),
		http.RedirectHandler("/elsewhere", http.StatusFound).ServeHTTP,
		streamThat("id: 3\ndata: c\n\n", true),
	)
	es := openEventSource(t, url, retryScale(0.05))
	es.waitFor(t, 5*time.Second, func(got []message) bool { return len(got) == 2 })
	before, cutAt := es.state(), time.Now()
	es.cut()
	if after := es.state(); before != "open" || after != "connecting" {
		t.Errorf("%s before the cut, %s after it", before, after)
	}
	got := es.waitFor(t, 5*time.Second, func(got []message) bool { return len(got) == 3 })
	if waited := time.Since(cutAt); waited < 300*time.Millisecond {
		t.Errorf("reconnected after %v, want 5 %% of the 6 s that the stream set", waited)
	}
	if want := []message{{"1", "message", "a"}, {"2", "message", "b"}, {"3", "message", "c"}}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	for i, want := range []string{"", "", "1", "2", "2", "2"} {
		if got := <-lastEventIDs; got != want {
			t.Errorf("request %d came with Last-Event-ID %q, want %q", i, got, want)
		}
	}
	es.close()
	// There is one more attempt if a connection that was kept turns out to have been closed.
	if n := es.attempts(); es.state() != "closed" || n < 5 || n > 6 || es.opens() != 4 || es.failure() != 0 {
		t.Errorf("got %+v, want closed, 5 or 6 attempts, 4 opens, no failure", es.look())
	}
}

// A browser takes any answer but an event stream as final. So the gateway's temporary refusals are event streams.
func TestEventSourceGivesUp(t *testing.T) {
	for _, tt := range []struct {
		status      int
		contentType string
	}{{200, "text/html"}, {200, ""}, {204, "text/event-stream"}, {410, "application/json"}, {503, "text/event-stream"}} {
		url, _ := scriptedServer(t, streamThat("data: a\n\n", false), func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", tt.contentType)
			w.WriteHeader(tt.status)
		})
		es := openEventSource(t, url)
		if got := es.waitClosed(t, 5*time.Second); got != tt.status {
			t.Errorf("%+v: got failure %d", tt, got)
		}
		if es.attempts() != 2 || es.opens() != 1 || len(es.events()) != 1 {
			t.Errorf("%+v: got %+v, want 2 attempts, 1 open, 1 event", tt, es.look())
		}
	}
}
