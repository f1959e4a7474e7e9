package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// checkConsistency checks that both maps and the gauge agree at one instant.
func checkConsistency(m *ConnectionManager) error {
	m.mu.Lock()
	now := &ConnectionManager{connections: maps.Clone(m.connections), tokens: maps.Clone(m.tokens)}
	m.mu.Unlock()
	for identifier, c := range now.connections {
		if got := now.tokens[c.token]; c.identifier != identifier || got != c {
			return fmt.Errorf("connections[%q] has token %q, but tokens has %+v for it", identifier, c.token, got)
		}
	}
	gauge := map[string]float64{}
	for token, c := range now.tokens {
		if got := now.connections[c.identifier]; c.token != token || got != c {
			return fmt.Errorf("tokens[%q] is %q, but connections has %+v for it", token, c.identifier, got)
		}
		gauge[serviceOf(c.identifier)]++
	}
	if got := now.Active(); !maps.Equal(got, gauge) {
		return fmt.Errorf("the gauge is %v, want %v", got, gauge)
	}
	return nil
}

// unreadMetrics returns counters that nobody reads.
func unreadMetrics() *backendMetrics { return newBackendMetrics(newRegistry("test"), nil) }

// nobody is an owner that ignores what it is told.
type nobody struct{}

func (nobody) seen(time.Time)  {}
func (nobody) ended(time.Time) {}

// connectToken makes token the connection of identifier, and returns the one that it replaces.
func connectToken(m *ConnectionManager, identifier, token string) (replaced string) {
	replaced, _ = m.OnConnect(identifier, connectRequest{token: token}, nobody{})
	return replaced
}

// The outcomes of a send.
const (
	delivered    = "delivered"
	heldBack     = "buffered"
	disconnected = "unknown token"
	suspended    = "the stream is being ended"
	failed       = "no answer"
)

func outcomeOf(r sendResult) string {
	switch {
	case r.err != nil:
		return r.err.Error()
	case r.buffered:
		return heldBack
	}
	return delivered
}

// senderFunc is a gateway that answers at once, with what the function returns.
type senderFunc func(events []event) sendResult

func (f senderFunc) send(token string, events []event, end bool) sendResult { return f(events) }

// errNoAnswer is any failure but a 404.
var errNoAnswer = errors.New("no answer")

// steppedGateway is a gateway that answers only when the test calls reply.
type steppedGateway struct {
	batches  bool // it takes several events at once
	mu       sync.Mutex
	underWay []*stepped
	closed   bool // answers 404 at once
}

// stepped is a send that waits for its answer.
type stepped struct {
	token  string
	events []event
	end    bool
	answer chan sendResult
}

// onTheWire returns the events with whole IDs.
func onTheWire(events []event) []event {
	events = slices.Clone(events)
	for i := range events {
		e := &events[i]
		e.ID, e.others = string(e.appendID(nil)), ""
	}
	return events
}

func (g *steppedGateway) send(token string, events []event, end bool) sendResult {
	if !g.batches && len(events) > 1 {
		events = events[:1]
	}
	s := &stepped{token, onTheWire(events), end, make(chan sendResult, 1)}
	g.mu.Lock()
	if g.closed {
		s.answer <- sendResult{err: errUnknownToken}
	} else {
		g.underWay = append(g.underWay, s)
	}
	g.mu.Unlock()
	return <-s.answer
}

// String returns a send as tests write it: "a x-1 one" gives stream a the event x-1 with the data one, "a close … end"
// also ends the stream, "a end" only ends it, and "a ?" asks whether it is there.
func (s *stepped) String() string {
	words := []string{s.token}
	for _, e := range s.events {
		words = append(words, strings.TrimSpace(e.ID+" "+e.Data))
	}
	if s.end {
		words = append(words, "end")
	}
	if len(words) == 1 {
		words = append(words, "?")
	}
	return strings.Join(words, " ")
}

// all returns what is under way, sorted by String.
func (g *steppedGateway) all() []*stepped {
	g.mu.Lock()
	defer g.mu.Unlock()
	return slices.SortedStableFunc(slices.Values(g.underWay), func(a, b *stepped) int {
		return strings.Compare(a.String(), b.String())
	})
}

func (g *steppedGateway) sends() (words []string) {
	for _, s := range g.all() {
		words = append(words, s.String())
	}
	return words
}

func (g *steppedGateway) reply(s *stepped, r sendResult) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.underWay = slices.DeleteFunc(g.underWay, func(other *stepped) bool { return other == s })
	s.answer <- r
}

// close answers 404 from now on, so that every sender ends.
func (g *steppedGateway) close() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.closed = true
	for _, s := range g.underWay {
		s.answer <- sendResult{err: errUnknownToken}
	}
	g.underWay = nil
}

// connTest is a ConnectionManager in a synctest bubble, with a gateway that only answers when the test says so. Each
// step of the test waits until everything else is at rest, and checks the invariants.
type connTest struct {
	*testing.T
	gateway *steppedGateway
	conns   *ConnectionManager
	log     bytes.Buffer
}

func testConns(t *testing.T, name string, f func(t *connTest)) {
	t.Helper()
	t.Run(name, func(t *testing.T) {
		t.Parallel()
		synctest.Test(t, func(t *testing.T) { f(newConnTest(t)) })
	})
}

func newConnTest(t *testing.T) *connTest {
	c := &connTest{T: t, gateway: &steppedGateway{}}
	log := slog.New(slog.NewTextHandler(&c.log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	c.conns = newConnectionManager(c.gateway, log, unreadMetrics())
	t.Cleanup(c.gateway.close)
	return c
}

// rest waits until everything is at rest, and checks the invariants.
func (t *connTest) rest() {
	t.Helper()
	synctest.Wait()
	must(t, checkConsistency(t.conns))
}

func (t *connTest) onConnect(identifier, token string) (replaced string) {
	t.Helper()
	replaced = connectToken(t.conns, identifier, token)
	t.rest()
	return replaced
}

func (t *connTest) onDisconnect(token string) {
	t.Helper()
	t.conns.OnDisconnect(token)
	t.rest()
}

func (t *connTest) sweep(interval time.Duration) {
	t.Helper()
	go t.conns.sweep(interval)
	t.rest()
}

// send begins a send of the event one to task:1. Its outcome comes through the channel.
func (t *connTest) send(token string) <-chan string {
	t.Helper()
	outcome := make(chan string, 1)
	go func() { outcome <- outcomeOf(t.conns.Send(token, []event{{Data: "one"}}, false)) }()
	t.rest()
	return outcome
}

// wantSend does what send does, has what is then under way answered, and checks the outcome.
func (t *connTest) wantSend(token string, answer func(send string), underWay, want string) {
	t.Helper()
	outcome := t.send(token)
	answer(underWay)
	t.wantOutcome(outcome, want)
}

// These answer a send that is under way.

func (t *connTest) ok(send string) { t.Helper(); t.answer(send, sendResult{taken: len(send)}) }
func (t *connTest) buffered(send string) {
	t.Helper()
	t.answer(send, sendResult{taken: len(send), buffered: true})
}
func (t *connTest) notFound(send string) {
	t.Helper()
	t.answer(send, sendResult{err: errUnknownToken})
}
func (t *connTest) fails(send string) { t.Helper(); t.answer(send, sendResult{err: errNoAnswer}) }

// answer answers a send. It caps r.taken at the number of its events.
func (t *connTest) answer(send string, r sendResult) {
	t.Helper()
	all := t.gateway.all()
	i := slices.IndexFunc(all, func(s *stepped) bool { return s.String() == send })
	if i < 0 {
		t.Fatalf("%q is not under way; these are: %q", send, all)
	}
	r.taken = min(r.taken, len(all[i].events))
	t.gateway.reply(all[i], r)
	t.rest()
}

func (t *connTest) wantUnderWay(want ...string) {
	t.Helper()
	slices.Sort(want)
	if got := t.gateway.sends(); !slices.Equal(got, want) {
		t.Fatalf("got %q under way, want %q", got, want)
	}
}

// wantOutcome waits for the outcome of a send.
func (t *connTest) wantOutcome(outcome <-chan string, want string) {
	t.Helper()
	if got := <-outcome; got != want {
		t.Errorf("got outcome %q, want %q", got, want)
	}
}

// wantConnections checks the connections, each as "identifier token".
func (t *connTest) wantConnections(want ...string) {
	t.Helper()
	t.conns.mu.Lock()
	var got []string
	for identifier, c := range t.conns.connections {
		got = append(got, identifier+" "+c.token)
	}
	t.conns.mu.Unlock()
	slices.Sort(got)
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Fatalf("got connections %q, want %q", got, want)
	}
}

func TestOnConnect(t *testing.T) {
	testConns(t, "replaces a connection", func(t *connTest) {
		t.onConnect("task:1", "a")
		if got, want := t.onConnect("task:1", "b"), "a"; got != want {
			t.Errorf("replaced %q, want %q", got, want)
		}
		t.wantConnections("task:1 b")
		if !t.conns.Connected("task:1") || t.conns.Connected("task:2") {
			t.Errorf("got connected %t, %t, want true, false", t.conns.Connected("task:1"), t.conns.Connected("task:2"))
		}
		t.wantUnderWay() // closing is a separate call, as the caller may hold a lock
		t.conns.CloseReplaced("task:1", "a")
		t.rest()
		t.wantUnderWay(closing("a", "replaced"))
		t.notFound(closing("a", "replaced"))
		t.wantConnections("task:1 b")
	})
	testConns(t, "same token again", func(t *connTest) {
		t.onConnect("task:1", "a")
		if replaced := t.onConnect("task:1", "a"); replaced != "" { // or its only stream would be closed
			t.Errorf("replaced %q by itself", replaced)
		}
		t.wantConnections("task:1 a")
	})
	testConns(t, "token moves to another identifier", func(t *connTest) {
		t.onConnect("task:1", "a")
		t.onConnect("task:2", "b")
		if got, want := t.onConnect("task:2", "a"), "b"; got != want {
			t.Errorf("replaced %q, want %q", got, want)
		}
		t.wantConnections("task:2 a")
	})
}

func TestOnDisconnect(t *testing.T) {
	// The disconnect callback of a stream often arrives after the browser has reconnected.
	testConns(t, "ignores a stale token", func(t *connTest) {
		const old, current = "0123456789abcdef", "b"
		t.onConnect("task:1", old)
		t.onConnect("task:1", current)
		t.log.Reset()
		for _, token := range []string{old, "unknown", ""} {
			t.onDisconnect(token)
		}
		t.wantConnections("task:1 b")
		if got := t.log.String(); strings.Count(got, "level=DEBUG") != 3 || strings.Contains(got, old) {
			t.Errorf("got log %s\nwant three debug records and no token in full", got)
		}
	})
}

func TestSend(t *testing.T) {
	testConns(t, "only to the current token", func(t *connTest) {
		t.onConnect("task:1", "a")
		t.onConnect("task:1", "b")
		for _, token := range []string{"a", "unknown", ""} {
			t.wantOutcome(t.send(token), disconnected)
		}
		t.wantUnderWay()
		t.wantSend("b", t.ok, "b one", delivered)
		t.wantSend("b", t.buffered, "b one", heldBack)
		t.wantSend("b", t.notFound, "b one", disconnected)
	})

	// After a failure the browser may lack the event. A later one would hide the gap, so the stream is ended instead.
	testConns(t, "after a failure ends the stream", func(t *connTest) {
		const token = "0123456789abcdef"
		t.onConnect("task:1", token)
		t.wantSend(token, t.fails, token+" one", failed)
		if got := t.log.String(); strings.Count(got, "level=ERROR") != 1 || strings.Contains(got, token) {
			t.Errorf("got log %s\nwant one error and no token in full", got)
		}
		for _, answer := range []func(string){t.fails, t.fails, t.ok} { // until the gateway says that the stream has ended
			t.wantConnections("task:1 " + token)
			t.wantSend(token, answer, token+" end", suspended)
		}
		t.wantConnections("task:1 " + token)
		t.wantSend(token, t.notFound, token+" end", suspended)
		t.wantConnections()
	})

	testConns(t, "probe", func(t *connTest) {
		probe := func(answer func(string), want string) {
			t.Helper()
			outcome := make(chan string, 1)
			go func() { outcome <- outcomeOf(t.conns.Probe("a", false)) }()
			t.rest()
			answer("a ?")
			t.wantOutcome(outcome, want)
		}
		t.onConnect("task:1", "a")
		probe(t.ok, delivered)
		probe(t.buffered, heldBack)
		probe(t.fails, failed)
		t.wantConnections("task:1 a")
		probe(t.notFound, disconnected)
		t.wantConnections()
	})
}

// That an event is skipped must not be left out of the log because of failures before it, which lose nothing.
func TestSkippedEventIsLogged(t *testing.T) {
	t.Parallel()
	var log bytes.Buffer
	answer := sendResult{err: errNoAnswer}
	m := newConnectionManager(senderFunc(func([]event) sendResult { return answer }), slog.New(slog.NewTextHandler(&log, nil)), unreadMetrics())
	for _, token := range []string{"a", "b"} {
		connectToken(m, "task:"+token, token)
		m.Send(token, []event{{Data: "x"}}, false)
		answer = sendResult{taken: 1, refused: 1}
	}
	for _, want := range []string{"sending an event", "skipping an event"} {
		if n := strings.Count(log.String(), want); n != 1 {
			t.Errorf("%q is logged %d times, want once:\n%s", want, n, log.String())
		}
	}
}

func TestSweep(t *testing.T) {
	testConns(t, "asks only about old connections", func(t *connTest) {
		t.onConnect("task:1", "a")
		time.Sleep(time.Minute / 2)
		t.onConnect("task:2", "b")
		time.Sleep(time.Minute / 2)
		t.sweep(time.Minute)
		t.wantUnderWay("a ?")
		t.ok("a ?")
		t.sweep(time.Minute) // a was checked just now, b is still young
		t.wantUnderWay()
		t.wantConnections("task:1 a", "task:2 b")
	})
	testConns(t, "removes only what the gateway does not know", func(t *connTest) {
		for i, token := range []string{"a", "b", "c", "d", "e"} {
			t.onConnect(fmt.Sprint("task:", i), token)
		}
		t.sweep(0)
		t.ok("a ?")
		t.buffered("b ?")
		t.fails("c ?")
		t.notFound("d ?")
		t.onConnect("task:4", "f")
		t.notFound("e ?") // replaced in the meantime
		t.wantConnections("task:0 a", "task:1 b", "task:2 c", "task:4 f")
	})

	// A close may fail. Without the sweep, the replaced stream would stay open and get no more events.
	testConns(t, "closes replaced streams again", func(t *connTest) {
		t.conns.CloseReplaced("task:1", "a")
		t.rest()
		t.fails(closing("a", "replaced"))
		for range 2 {
			t.sweep(time.Minute)
			t.wantUnderWay(closing("a", "replaced"))
			t.fails(closing("a", "replaced"))
		}
		t.sweep(time.Minute)
		t.notFound(closing("a", "replaced"))
		t.sweep(time.Minute)
		t.wantUnderWay()
	})
	testConns(t, "bounds its sends", func(t *connTest) {
		for i := range 3 * sweepers {
			t.onConnect(fmt.Sprint("task:", i), fmt.Sprint("t", i))
		}
		go t.conns.sweep(0)
		asked := 0
		for t.rest(); len(t.gateway.sends()) > 0; asked++ {
			if got, want := len(t.gateway.sends()), min(sweepers, 3*sweepers-asked); got != want {
				t.Fatalf("%d sends under way after %d, want %d", got, asked, want)
			}
			t.ok(t.gateway.sends()[0])
		}
		if want := 3 * sweepers; asked != want {
			t.Errorf("asked about %d connections, want %d", asked, want)
		}
	})

	// A gateway that crashed sends no disconnect callbacks. One sweep corrects the gauge.
	testConns(t, "heals the gauge", func(t *connTest) {
		ctx, cancel := context.WithCancel(t.Context())
		go t.conns.Sweep(ctx, time.Minute)
		for i := range 100 {
			t.onConnect(fmt.Sprint("version:", i), fmt.Sprint("t", i))
			time.Sleep(time.Second / 10)
		}
		t.gateway.close()
		time.Sleep(time.Minute + time.Minute/8)
		t.wantConnections()
		cancel()
		t.rest()
	})
}

func TestStop(t *testing.T) {
	testConns(t, "drain", func(t *connTest) {
		t.conns.Drain(t.Context()) // nothing is under way
		t.conns.CloseReplaced("task:1", "a")
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		t.conns.Drain(ctx)
		if ctx.Err() == nil || !strings.Contains(t.log.String(), "level=WARN") {
			t.Errorf("got %v and log %s\nwant a timeout and a warning", ctx.Err(), t.log.String())
		}
		drained := make(chan struct{})
		go func() { t.conns.Drain(t.Context()); close(drained) }()
		t.ok(closing("a", "replaced"))
		<-drained
	})
	testConns(t, "end all", func(t *connTest) {
		t.onConnect("task:1", "a")
		t.onConnect("task:2", "b")
		t.onConnect("task:2", "c")
		ended := make(chan bool, 1)
		go func() { t.conns.EndAll(t.Context()); ended <- true }()
		t.rest()
		t.wantUnderWay("a end", "c end")
		t.ok("a end")
		if len(ended) > 0 {
			t.Error("did not wait for the last stream")
		}
		t.fails("c end")
		<-ended
	})
}

// The counters count connects and disconnect callbacks. What a 404 or a newer connection removes shows in the gauge.
func TestRecordSSEGatewayConnection(t *testing.T) {
	t.Parallel()
	reg := newRegistry("test")
	unknown := senderFunc(func([]event) sendResult { return sendResult{err: errUnknownToken} })
	m := newConnectionManager(unknown, slog.New(slog.DiscardHandler), newBackendMetrics(reg, nil))
	connectToken(m, "task:1", "a")
	connectToken(m, "task:1", "b") // replaces a
	connectToken(m, "version:1", "c")
	connectToken(m, "version:2", "d")
	m.OnDisconnect("a") // stale
	m.OnDisconnect("b")
	m.OnDisconnect("b") // twice
	m.OnDisconnect("c")
	m.Send("d", []event{{}}, false) // 404
	wantSeries(t, scrapeAll(reg), map[string]float64{
		`sse_gateway_connections_total{service="task",action="connect"}`:       2,
		`sse_gateway_connections_total{service="task",action="disconnect"}`:    1,
		`sse_gateway_connections_total{service="version",action="connect"}`:    2,
		`sse_gateway_connections_total{service="version",action="disconnect"}`: 1,
	})
}

func TestRecordSSEGatewayEvent(t *testing.T) {
	t.Parallel()
	reg := newRegistry("test")
	answer := sendResult{taken: 1}
	m := newConnectionManager(senderFunc(func([]event) sendResult { return answer }),
		slog.New(slog.DiscardHandler), newBackendMetrics(reg, nil))
	connectToken(m, "task:1", "a")
	m.Send("a", []event{{}}, false)
	answer = sendResult{err: errNoAnswer}
	m.Send("a", []event{{}}, false)
	m.Send("a", []event{{}}, false) // not tried any more
	connectToken(m, "task:1", "b")
	answer = sendResult{taken: 2, err: errUnknownToken}
	m.Send("b", make([]event, 4), false)
	wantSeries(t, scrapeAll(reg), map[string]float64{
		`sse_gateway_events_sent_total{service="task",status="success"}`: 3,
		`sse_gateway_events_sent_total{service="task",status="error"}`:   2,
		`sse_gateway_send_duration_seconds_count{service="task"}`:        3,
	})
}

// wantSeries checks series of a page of metrics.
func wantSeries(t *testing.T, text string, want map[string]float64) {
	t.Helper()
	for series, want := range want {
		if got := scrapeValue(text, series); got != want {
			t.Errorf("%s: got %v, want %v", series, got, want)
		}
	}
}

// mutexWatch is a gateway and a log handler that must not be called under the ConnectionManager's mutex. The gateway
// may make a callback that needs the mutex before its call returns.
type mutexWatch struct {
	slog.Handler
	t     *testing.T
	conns *ConnectionManager
	err   error // answer of the gateway
	calls atomic.Int64
}

func (w *mutexWatch) called(by string) {
	w.calls.Add(1)
	for end := time.Now().Add(time.Second); !w.conns.mu.TryLock(); { // another goroutine may have it for a moment
		if time.Now().After(end) {
			w.t.Errorf("%s is called under the mutex", by)
			return
		}
		runtime.Gosched()
	}
	w.conns.mu.Unlock()
}

func (w *mutexWatch) send(string, []event, bool) sendResult {
	w.called("gateway")
	return sendResult{err: w.err}
}

func (w *mutexWatch) Enabled(context.Context, slog.Level) bool { w.called("log"); return true }

func (w *mutexWatch) Handle(context.Context, slog.Record) error {
	w.called("log")
	return nil
}

func TestNothingIsCalledUnderTheMutex(t *testing.T) {
	t.Parallel()
	w := &mutexWatch{t: t}
	m := newConnectionManager(w, slog.New(w), unreadMetrics())
	w.conns = m
	for _, w.err = range []error{nil, errNoAnswer, errUnknownToken} {
		connectToken(m, "task:1", "a")
		m.CloseReplaced("task:1", connectToken(m, "task:1", "b"))
		m.Drain(t.Context())
		m.OnDisconnect("a")
		m.Send("b", []event{{}}, false)
		m.Send("b", []event{{}}, false)
		m.sweep(0)
		m.Drain(t.Context())
		m.OnDisconnect("b")
	}
	if w.calls.Load() == 0 {
		t.Error("nothing was called")
	}
}

// What happens to three streams of two identifiers, in every order that the network may choose. Only the order within
// each sequence is fixed.
func TestEveryInterleaving(t *testing.T) {
	t.Parallel()
	type state map[string]string                                                     // token by identifier
	identifiers := map[string]string{"a": "task:1", "b": "task:1", "c": "version:1"} // by token
	take := func(t *connTest, step string, want state) {
		do, token, _ := strings.Cut(step, " ")
		identifier, ends := identifiers[token], false
		switch do {
		case "connect":
			if got := t.onConnect(identifier, token); got != want[identifier] {
				t.Errorf("replaced %q, want %q", got, want[identifier])
			}
			want[identifier] = token
		case "disconnect":
			t.onDisconnect(token)
			ends = true
		case "send":
			t.send(token)
			underWay := map[bool][]string{true: {token + " one"}}
			t.wantUnderWay(underWay[want[identifier] == token]...)
		case "404": // says that one stream is gone; by then its identifier may have another one
			if ends = slices.Contains(t.gateway.sends(), token+" one"); ends {
				t.notFound(token + " one")
			}
		}
		if ends && want[identifier] == token {
			delete(want, identifier)
		}
	}
	orders := 0
	interleave([][]string{
		{"connect a", "disconnect a"},
		{"connect b", "disconnect b"},
		{"send a", "404 a"},
		{"connect c", "disconnect c"},
	}, nil, func(order []string) {
		orders++
		synctest.Test(t, func(t *testing.T) {
			c, want := newConnTest(t), state{}
			for i, step := range order {
				take(c, step, want)
				var connections []string
				for identifier, token := range want {
					connections = append(connections, identifier+" "+token)
				}
				c.wantConnections(connections...)
				if t.Failed() {
					t.Fatal("after ", strings.Join(order[:i+1], ", "))
				}
			}
		})
	})
	if want := 2520; orders != want { // 8! / (2! 2! 2! 2!)
		t.Errorf("got %d orders, want %d", orders, want)
	}
}

// interleave calls f with every order of all steps that keeps the order within each sequence.
func interleave(sequences [][]string, begun []string, f func(order []string)) {
	done := true
	for i, sequence := range sequences {
		if len(sequence) > 0 {
			done = false
			rest := slices.Clone(sequences)
			rest[i] = sequence[1:]
			interleave(rest, append(slices.Clip(begun), sequence[0]), f)
		}
	}
	if done {
		f(begun)
	}
}

// Several workers take thousands of steps. Each checks the invariants after each of its steps, while the others go on.
func TestConcurrentStepsKeepTheInvariants(t *testing.T) {
	t.Parallel()
	const workers, steps = 8, 4000
	gateway := senderFunc(func([]event) sendResult {
		runtime.Gosched() // others go on while a send is in flight
		switch rand.N(4) {
		case 0:
			return sendResult{err: errUnknownToken}
		case 1:
			return sendResult{err: errNoAnswer}
		}
		return sendResult{taken: 1}
	})
	m := newConnectionManager(gateway, slog.New(slog.DiscardHandler), unreadMetrics())
	identifiers := []string{"task:1", "task:2", "task:3", "version:1", "version:2"}
	var made atomic.Int64
	oldToken := func() string { // recent enough that it may be current
		return fmt.Sprint("t", max(0, made.Load()-rand.N[int64](20)))
	}
	step := func() {
		identifier := identifiers[rand.N(len(identifiers))]
		switch rand.N(6) {
		case 0, 1:
			if replaced := connectToken(m, identifier, fmt.Sprint("t", made.Add(1))); replaced != "" {
				m.CloseReplaced(identifier, replaced)
			}
		case 2:
			connectToken(m, identifier, oldToken()) // which moves here, or comes back
		case 3:
			m.OnDisconnect(oldToken())
		case 4:
			m.mu.Lock()
			token := ""
			if c := m.connections[identifier]; c != nil {
				token = c.token
			}
			m.mu.Unlock()
			m.Send(token, []event{{}}, false)
		case 5:
			m.sweep(0)
		}
	}
	var wg sync.WaitGroup
	for range workers {
		wg.Go(func() {
			for range steps {
				step()
				if err := checkConsistency(m); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	m.Drain(t.Context())
	for i := range made.Load() + 1 {
		m.OnDisconnect(fmt.Sprint("t", i))
	}
	if got := m.Active(); len(got) != 0 || len(m.connections) != 0 || len(m.tokens) != 0 {
		t.Errorf("got gauge %v, %d connections and %d tokens after all disconnected", got, len(m.connections), len(m.tokens))
	}
}
