package main

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// taskLike and versionLike are policies like those of the services, but with the epoch x and without a limit.
func epochX() string { return "x" }

func taskLike() logPolicy {
	return logPolicy{event: "task_event", epoch: epochX, replay: true}
}

func versionLike() logPolicy {
	return logPolicy{event: "version", epoch: epochX}
}

// limited is the policy with a limit of n events.
func limited(policy logPolicy, n int) logPolicy {
	policy.limit = n
	return policy
}

// logTest is a connTest with an event log, which task:1 follows. The events of the log have the IDs x-1, x-2 and so on;
// a stream that begins after x-0 gets all of them. The tokens of streams are one letter. Sends are written as
// stepped.String does: "a x-1 one" gives stream a the event x-1 with the data one.
type logTest struct {
	*connTest
	events *eventLog
}

func testLog(t *testing.T, name string, policy logPolicy, f func(t *logTest)) {
	t.Helper()
	testConns(t, name, func(t *connTest) { f(newLogTest(t, policy)) })
}

func newLogTest(t *connTest, policy logPolicy) *logTest {
	o := &logTest{connTest: t}
	policy.dropped = new(series)
	o.events = newEventLog(&policy)
	return o
}

// Append adds and publishes an event, unless the log has ended. It returns its number, and does not wait for its
// delivery.
func (l *eventLog) Append(data string, keep bool) (n uint64) {
	if l.reason == "" {
		n = l.Add(entry{data: data, keep: keep})
		l.Publish(n, "")
	}
	return n
}

// End ends the log after its last event.
func (l *eventLog) End(reason string) { l.Publish(l.last, reason) }

// wantDropped checks how many events count as dropped so far.
func (t *logTest) wantDropped(want int) {
	t.Helper()
	if got := int(t.events.policy.dropped.Load()); got != want {
		t.Errorf("dropped %d events, want %d", got, want)
	}
}

func (t *logTest) append(data ...string) {
	t.Helper()
	for _, d := range data {
		t.events.Append(d, false)
		t.rest()
	}
}

func (t *logTest) end(reason string) {
	t.Helper()
	t.events.End(reason)
	t.rest()
}

// keep appends an event that the limit must not drop.
func (t *logTest) keep(data string) {
	t.Helper()
	t.events.Append(data, true)
	t.rest()
}

// all follows the logs.
func all(logs ...*eventLog) func(follow func(*eventLog)) {
	return func(follow func(*eventLog)) {
		for _, l := range logs {
			follow(l)
		}
	}
}

// follow makes the stream of c the connection of identifier, which follows one log.
func follow(conns *ConnectionManager, identifier string, c connectRequest, events *eventLog) (open event, end bool, err error) {
	f := &follower{identifier: identifier}
	return f.connect(conns, c, all(events))
}

// follow connects a stream as if the gateway had been asked, and knew both this stream and the present one.
func (t *logTest) follow(c connectRequest) (open event, end bool) {
	t.Helper()
	c.probes = true
	if old := t.conns.connections["task:1"]; old != nil {
		c.replaces = old.token
		old.owner.seen(time.Now())
	}
	open, end, err := follow(t.conns, "task:1", c, t.events)
	if err != nil {
		t.Error(err)
	}
	t.rest()
	return open, end
}

// connect connects a stream, checks after which event it begins, and waits until what it is given counts as received.
func (t *logTest) connect(token, lastEventID, wantOpen string) {
	t.Helper()
	open, _ := t.follow(connectRequest{token: token, lastEventID: lastEventID})
	if got := open.ID; got != wantOpen {
		t.Errorf("%s with last event ID %q: begins after %q, want %q", token, lastEventID, got, wantOpen)
	}
	time.Sleep(settleTime)
	t.rest()
}

// begin appends events, and connects stream a, which gets them from the first on.
func (t *logTest) begin(data ...string) {
	t.Helper()
	t.append(data...)
	t.connect("a", "", "x-0")
}

// visit connects a stream as connect does, checks what it is then given, and disconnects it.
func (t *logTest) visit(token, lastEventID, wantOpen string, want ...string) {
	t.Helper()
	t.connect(token, lastEventID, wantOpen)
	t.delivers(want...)
	t.onDisconnect(token)
}

// ok has the gateway take a send, and then say that the stream is still there.
func (t *logTest) ok(send string) {
	t.Helper()
	t.connTest.ok(send)
	token, _, _ := strings.Cut(send, " ")
	if c := t.conns.connections["task:1"]; c != nil && c.token == token {
		c.owner.seen(time.Now())
	}
}

// delivers has the gateway take everything, and checks what that was, stream by stream, each in its order.
func (t *logTest) delivers(want ...string) {
	t.Helper()
	var got []string
	for sends := t.gateway.sends(); len(sends) > 0; sends = t.gateway.sends() {
		t.ok(sends[0])
		got = append(got, sends[0])
	}
	slices.SortStableFunc(got, func(a, b string) int { return cmp.Compare(a[:1], b[:1]) })
	if !slices.Equal(got, want) {
		t.Errorf("delivered %q, want %q", got, want)
	}
}

// closing is the send that ends a stream with connection_close and a reason.
func closing(token, reason string) string {
	return token + ` close {"reason":"` + reason + `"} end`
}

// Where a connection begins, and with which events.
func TestFollowerBegins(t *testing.T) {
	// The last event ID proves that this event and all before it have arrived, whatever the gateway answered.
	testLog(t, "the last event ID tells what arrived", versionLike(), func(t *logTest) {
		t.append("one", "two", "three")
		t.connect("a", "x-2", "x-2")
		t.notFound("a x-3 three")
		t.connect("b", "x-1", "x-1")
		t.notFound("b x-2 two")
		t.visit("c", "", "x-2", "c x-3 three")
	})

	testLog(t, "the same token again while the first sends", taskLike(), func(t *logTest) {
		t.begin("one", "two")
		t.connect("a", "", "x-0")
		t.delivers("a x-1 one", "a x-1 one", "a x-2 two")
	})

	// A proxy may repeat a callback. The first must not affect the second.
	testLog(t, "the same token again", taskLike(), func(t *logTest) {
		t.begin("one")
		t.notFound("a x-1 one")
		t.visit("a", "", "x-0", "a x-1 one")
	})

	// A connection that ends while its logs are looked up follows none of them.
	testLog(t, "ended before it begins", taskLike(), func(t *logTest) {
		f := &follower{identifier: "task:1"}
		_, _, err := f.connect(t.conns, connectRequest{token: "a"}, func(follow func(*eventLog)) {
			t.conns.OnDisconnect("a")
			follow(t.events)
		})
		if n := t.events.stats().followers; n != 0 || err != nil {
			t.Errorf("got %d followers and %v, want none", n, err)
		}
	})
}

func TestRace(t *testing.T) {
	// The callback of an attempt that the browser gave up may arrive after that of its next attempt. If the dead stream
	// were taken for the newer one, the only page would be told that it was replaced.
	testLog(t, "a callback overtakes another", taskLike(), func(t *logTest) {
		connect := func(token, order string) (event, bool) {
			return t.follow(connectRequest{token: token, order: parseOrder(order)})
		}
		connect("b", "gateway-12")
		if open, end := connect("a", "gateway-9"); open.Data != `{"reason":"replaced"}` || !end {
			t.Errorf("the overtaken stream begins with %v and ends at once: %t; want replaced, true", open, end)
		}
		t.append("one")
		t.delivers("b x-1 one")
		connect("c", "another-1") // after the gateway restarted
		t.delivers(closing("b", "replaced"), "c x-1 one")
		connect("d", "") // a gateway that does not count
		t.delivers(closing("c", "replaced"), "d x-1 one")
	})

	// While the gateway is asked about a late callback, another stream may become the connection. The answer is about
	// the old one, so the gateway must be asked again.
	testLog(t, "the connection changes while the gateway is asked", taskLike(), func(t *logTest) {
		t.connect("a", "", "x-0")
		ghost := connectRequest{token: "g", probes: true}
		_, _, err := follow(t.conns, "task:1", ghost, t.events)
		if err != errAskFirst {
			t.Fatalf("got %v, want errAskFirst", err)
		}
		asked := make(chan bool)
		go func() { asked <- t.conns.Ask("task:1", &ghost) }()
		t.rest()
		t.connTest.ok("a ?")
		t.connTest.ok("g ?") // then the stream dies, but this answer is still under way
		t.connect("b", "", "x-0")
		t.delivers(closing("a", "replaced"))
		if !<-asked {
			t.Error("Ask: got false, want true: the gateway knew the stream")
		}
		if _, _, err := follow(t.conns, "task:1", ghost, t.events); err != errAskFirst {
			t.Errorf("got %v, want errAskFirst again", err)
		}
		t.wantConnections("task:1 b")
	})

	// The later one is the connection, in both maps and for the log.
	testLog(t, "two at once", taskLike(), func(t *logTest) {
		t.append("one", "two")
		for range 100 {
			var both sync.WaitGroup
			for _, token := range []string{"a", "b"} {
				both.Go(func() { follow(t.conns, "task:1", connectRequest{token: token}, t.events) })
			}
			both.Wait()
			t.rest()
			first, second := "a", "b"
			if t.conns.tokens["a"] != nil {
				first, second = "b", "a"
			}
			t.wantConnections("task:1 " + second)
			if slices.Contains(t.gateway.sends(), first+" x-1 one") {
				t.ok(first + " x-1 one")
			}
			t.ok(closing(first, "replaced"))
			t.delivers(second+" x-1 one", second+" x-2 two")
			t.onDisconnect(second)
		}
	})

	// A late answer to an earlier send does not show that the stream is still open.
	testLog(t, "a late answer", versionLike(), func(t *logTest) {
		t.append("one")
		t.follow(connectRequest{token: "a"})
		time.Sleep(settleTime)
		t.connTest.ok("a x-1 one")
		t.append("two")
		t.notFound("a x-2 two")
		t.connect("b", "", "x-0")
	})
}

func TestFollowerResume(t *testing.T) {
	resume := func(t *testing.T, policy logPolicy, lastEventID, wantOpen string) {
		testLog(t, fmt.Sprintf("%s after %q", policy.event, lastEventID), policy, func(t *logTest) {
			t.append("data", "data", "data")
			t.visit("a", "", "x-0", "a x-1 data", "a x-2 data", "a x-3 data")
			t.connect("b", lastEventID, wantOpen)
			rest := []string{"b x-1 data", "b x-2 data", "b x-3 data"}
			t.delivers(rest[slices.Index([]string{"x-0", "x-1", "x-2", "x-3"}, wantOpen):]...)
		})
	}
	for _, id := range []string{"x-0", "x-1", "x-3"} {
		resume(t, taskLike(), id, id)
		resume(t, versionLike(), id, id)
	}
	for _, id := range []string{ // of no event of this log
		"", "x-4", "-1", "1", "x", "x-", "x--1", "x-+1", "x-1-2", "x-1.5", "x-18446744073709551616", "close",
		"y-1",      // the backend was restarted
		"x-1, x-2", // the header was sent twice
	} {
		resume(t, taskLike(), id, "x-0")
		resume(t, versionLike(), id, "x-3")
	}
}

// A backlog goes out in runs, each up to twice as long as what was taken of the one before.
func TestFollowerRuns(t *testing.T) {
	testLog(t, "are bounded", versionLike(), func(t *logTest) {
		t.gateway.batches = true
		half := strings.Repeat("x", maxRunBytes/2)
		t.append(half, half, half, half+half+"x")
		for range 4 * maxRun {
			t.append("data")
		}
		t.connect("a", "", "x-0")
		var got []int
		for sends := t.gateway.all(); len(sends) > 0; sends = t.gateway.all() {
			got = append(got, len(sends[0].events))
			t.ok(sends[0].String())
		}
		if want := []int{1, 2, 1, 2, 4, 8, 16, 32, 64, 64, 64, 2}; !slices.Equal(got, want) {
			t.Errorf("got %d events at once, want %d", got, want)
		}
	})
}

// The part of a run that the gateway took counts as sent, even if the rest failed.
func TestFollowerRunTakenInPart(t *testing.T) {
	for name, test := range map[string]struct {
		answer   sendResult
		underWay []string
	}{
		"the stream has ended": {sendResult{taken: 1, err: errUnknownToken}, []string{"a x-3 3 x-4 4"}},
		"in doubt":             {sendResult{taken: 1, err: errNoAnswer}, []string{"a end"}},
		"one at a time":        {sendResult{taken: 1}, []string{"a x-3 3 x-4 4"}},
	} {
		testLog(t, name, versionLike(), func(t *logTest) {
			t.gateway.batches = true
			t.begin("1", "2", "3", "4")
			t.ok("a x-1 1")
			t.answer("a x-2 2 x-3 3", test.answer)
			t.wantUnderWay(test.underWay...)
			t.connect("b", "", "x-2")
		})
	}
}

// Events that are dropped while under way do not count as dropped until it is known whether the gateway took them.
func TestFollowerDropsWhatIsUnderWay(t *testing.T) {
	for name, answer := range map[string]sendResult{"taken": {taken: 2}, "failed": {err: errNoAnswer}} {
		testLog(t, name, limited(versionLike(), 3), func(t *logTest) {
			t.gateway.batches = true
			t.begin("1", "2", "3")
			t.ok("a x-1 1")
			t.wantWait(3, waited{answer.err == nil, 0}, func() { // for the last of them
				t.append("4", "5", "6", "7")
				t.wantDropped(1)
				t.answer("a x-2 2 x-3 3", answer)
				t.wantDropped(3 - answer.taken)
			})
		})
	}
}

func TestFollowerLimit(t *testing.T) {
	testLog(t, "of a task", limited(taskLike(), 3), func(t *logTest) {
		t.keep("first")
		t.append("2", "3", "4", "5")
		t.wantDropped(2)
		t.keep("last")
		t.visit("a", "", "x-0", "a x-1 first", "a x-5 5", "a x-6 last")

		t.keep("very last")
		t.keep("the end") // nothing left may be dropped
		t.wantDropped(3)  // 5 had been delivered before it was dropped
		// x-2 was dropped, but its number tells where to resume.
		t.visit("b", "x-2", "x-2", "b x-6 last", "b x-7 very last", "b x-8 the end")
	})

	// Events held back for a stream that never opened were delivered to nobody, so they count as dropped.
	testLog(t, "drops what was held back and lost", limited(versionLike(), 2), func(t *logTest) {
		t.begin("1", "2")
		t.buffered("a x-1 1")
		t.buffered("a x-2 2")
		t.notFound("a ?")
		t.append("3", "4")
		t.wantDropped(2)
		t.visit("b", "", "x-0", "b x-3 3", "b x-4 4")
	})

	// The events that a resuming browser has yet to get are still needed.
	testLog(t, "sheds nothing under way", versionLike(), func(t *logTest) {
		t.append("1", "2", "3")
		t.visit("a", "", "x-0", "a x-1 1", "a x-2 2", "a x-3 3")
		t.connect("b", "x-0", "x-0")
		t.ok("b x-1 1")
		t.events.Shed()
		t.delivers("b x-2 2", "b x-3 3")
	})

	// The limit applies to the events that a fresh connection would get. Delivered events do not displace them.
	testLog(t, "of versions", limited(versionLike(), 2), func(t *logTest) {
		t.connect("a", "", "x-0")
		for i := range 5 {
			t.append("data")
			t.delivers(fmt.Sprintf("a x-%d data", i+1))
		}
		t.onDisconnect("a")
		t.append("six", "seven")
		t.wantDropped(0)
		t.append("eight")
		t.wantDropped(1)
		t.visit("b", "", "x-5", "b x-7 seven", "b x-8 eight")
	})

	// The gateway may have taken all the events that the limit allows, and the browser may have none of them.
	testLog(t, "keeps what the gateway took", limited(versionLike(), 4), func(t *logTest) {
		t.append("1", "2", "3", "4")
		t.visit("a", "", "x-0", "a x-1 1", "a x-2 2", "a x-3 3", "a x-4 4")
		t.append("5")
		t.visit("b", "x-0", "x-0", "b x-1 1", "b x-2 2", "b x-3 3", "b x-4 4", "b x-5 5")
		t.visit("c", "x-0", "x-0", "c x-2 2", "c x-3 3", "c x-4 4", "c x-5 5")
		t.visit("d", "x-4", "x-4", "d x-5 5")
	})
	testLog(t, "size", versionLike(), func(t *logTest) {
		want := func(kept, waiting, bytes int) {
			t.Helper()
			if s := t.events.stats(); s.kept != kept || s.waiting != waiting || s.bytes != bytes {
				t.Errorf("got %d kept, %d waiting, %d bytes, want %d, %d, %d", s.kept, s.waiting, s.bytes, kept, waiting, bytes)
			}
		}
		want(0, 0, 0)
		t.append("one", "two")
		t.events.Publish(t.events.Add(entry{data: "shared", shared: true}), "")
		t.append("four")
		want(4, 4, 24)
		t.connect("a", "", "x-0")
		t.ok("a x-1 one")
		want(4, 3, 24)
		t.events.Shed()
		want(3, 3, 16)
		t.delivers("a x-2 two", "a x-3 shared", "a x-4 four")
		want(3, 0, 16)
		t.events.Shed()
		want(0, 0, 0)
	})
}

func TestFollowerEnd(t *testing.T) {
	testLog(t, "after the events", taskLike(), func(t *logTest) {
		t.connect("a", "", "x-0")
		t.append("one", "two")
		t.end("task_completed")
		t.delivers("a x-1 one", "a x-2 two", closing("a", "task_completed"))
	})
	testLog(t, "at once for a browser that has everything", taskLike(), func(t *logTest) {
		t.append("one")
		t.end("task_failed")
		t.visit("a", "x-1", "x-1", closing("a", "task_failed"))
		t.visit("b", "", "x-0", "b x-1 one", closing("b", "task_failed")) // a page that was loaded again
	})

	// After a failed send, the next event ends the stream. The end of the log counts as an event, so this is at once.
	testLog(t, "after a failed send", taskLike(), func(t *logTest) {
		t.begin("one")
		t.end("task_completed")
		t.fails("a x-1 one")
		t.wantUnderWay("a end")
	})

	// An event in another log also ends a stream that may have a gap.
	testLog(t, "of a page, after a failed send", versionLike(), func(t *logTest) {
		t.append("one")
		t.page("a", logOf("t", 1))
		t.fails("a t-1.x-0 t")
		t.wantUnderWay("a end")
	})

	// The end itself may fail to arrive. The browser comes back for it.
	testLog(t, "again after it failed", taskLike(), func(t *logTest) {
		t.connect("a", "", "x-0")
		t.end("task_completed")
		t.fails(closing("a", "task_completed"))
		t.wantUnderWay()
		t.sweep(0)
		t.ok("a end")
		t.onDisconnect("a")
		t.visit("b", "x-0", "x-0", closing("b", "task_completed"))
	})
}

// waited is the result of Wait, and how long it took.
type waited struct {
	given bool
	after time.Duration
}

// wantWait waits for event n, for a second at most, while the steps are taken. It checks the result.
func (t *logTest) wantWait(n uint64, want waited, steps ...func()) {
	t.Helper()
	result := make(chan waited, 1)
	go func() {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		start := time.Now()
		given := t.events.Wait(ctx, n)
		result <- waited{given, time.Since(start)}
	}()
	t.rest()
	for _, step := range steps {
		step()
	}
	if got := <-result; got != want {
		t.Errorf("got %t after %s, want %t after %s", got.given, got.after, want.given, want.after)
	}
}

func TestFollowerWait(t *testing.T) {
	given, lost := waited{true, 0}, waited{false, 0}
	testLog(t, "for each event", versionLike(), func(t *logTest) {
		t.append("one")
		t.wantWait(1, lost) // nobody is there
		t.connect("a", "", "x-0")
		t.wantWait(1, given, func() { t.ok("a x-1 one") })
		t.wantWait(1, given)

		t.append("two")
		t.wantWait(2, waited{false, time.Second})
		t.wantWait(2, lost, func() { t.notFound("a x-2 two") })
		t.connect("b", "", "x-1")
		t.wantWait(2, lost, func() { t.fails("b x-2 two") })
		t.connect("c", "", "x-1")
		t.wantWait(2, given, func() {
			t.follow(connectRequest{token: "d"})
			t.ok("d x-2 two")
		})
		t.connect("e", "x-0", "x-0") // gets both again
		t.wantWait(2, given)
	})

	// A browser that comes back with the event's ID has the event. This must end the wait, as nothing more is sent.
	testLog(t, "until the browser names the event", versionLike(), func(t *logTest) {
		t.begin("one")
		t.wantWait(1, given, func() { t.connect("b", "x-1", "x-1") })
	})

	// A dropped event is delivered to nobody, even if later ones are.
	testLog(t, "for a dropped event", limited(versionLike(), 1), func(t *logTest) {
		t.connect("a", "", "x-0")
		t.append("one", "two")
		t.wantWait(2, lost, func() { t.append("three") })
	})

	// An event is not sent while it is unknown what became of earlier ones that were held back. If those are lost, the
	// wait for it must end.
	testLog(t, "after what was held back and lost", versionLike(), func(t *logTest) {
		t.begin("one")
		t.buffered("a x-1 one")
		t.append("two")
		t.wantWait(2, lost, func() { t.notFound("a ?") })
	})

	// An event that the gateway holds back reaches the browser only when its stream opens.
	testLog(t, "until the stream opens", versionLike(), func(t *logTest) {
		t.begin("one")
		t.wantWait(1, lost, func() {
			t.buffered("a x-1 one")
			t.notFound("a ?")
		})
		t.connect("b", "", "x-0")
		t.wantWait(1, given, func() {
			t.buffered("b x-1 one")
			t.ok("b ?")
		})
	})

	// A refused event is delivered to no stream.
	testLog(t, "for a refused event", versionLike(), func(t *logTest) {
		t.begin("one")
		t.wantWait(1, lost, func() { t.answer("a x-1 one", sendResult{taken: 1, refused: 1}) })
	})

	// The answer to a refused event does not tell whether the stream has opened.
	testLog(t, "after what is held back", versionLike(), func(t *logTest) {
		t.begin("one")
		t.wantWait(1, lost, func() {
			t.append("two")
			t.buffered("a x-1 one")
			t.answer("a x-2 two", sendResult{taken: 1, refused: 1})
			t.notFound("a ?")
		})
	})
}

// The gateway holds events back while the connect callback is under way. If the browser leaves before its stream opens,
// it never gets them.
func TestFollowerHeldBack(t *testing.T) {
	testLog(t, "asks whether the stream opened", versionLike(), func(t *logTest) {
		t.begin("one")
		t.buffered("a x-1 one")
		t.append("two")
		t.wantUnderWay("a ?")
		t.ok("a ?")
		time.Sleep(settleTime)
		t.onDisconnect("a")
		t.notFound("a x-2 two")
		t.visit("b", "", "x-1", "b x-2 two")
	})

	// No connect callback takes longer than openLimit. The next send then tells whether the stream is open.
	testLog(t, "asks for a limited time", versionLike(), func(t *logTest) {
		t.begin("one")
		t.buffered("a x-1 one")
		start := time.Now()
		for len(t.gateway.sends()) > 0 {
			t.buffered("a ?")
			time.Sleep(openPause)
			t.rest()
		}
		if got, want := time.Since(start)-openPause, openLimit; got != want { // the last pause is not needed
			t.Errorf("asked for %s, want %s", got, want)
		}
		t.append("two")
		t.delivers("a x-2 two") // taken and not held back, so the stream is open
		time.Sleep(settleTime)
		t.connect("b", "", "x-2")
	})

	// A fresh stream of a task gets all of its events anyway.
	testLog(t, "does not ask for a task", taskLike(), func(t *logTest) {
		t.begin("one")
		t.buffered("a x-1 one")
		t.wantUnderWay()
	})

	// A gateway that announces no features writes an empty event if it is asked before the stream is open.
	testLog(t, "asks a foreign gateway only at the end", versionLike(), func(t *logTest) {
		t.append("one")
		follow(t.conns, "task:1", connectRequest{token: "a"}, t.events)
		t.rest()
		t.buffered("a x-1 one")
		time.Sleep(openLimit - 1)
		t.wantUnderWay()
		time.Sleep(time.Nanosecond)
		t.rest()
		t.connTest.ok("a ?") // by now the stream is open, or was given up
	})

	// If the gateway cannot be asked whether the stream opened, a page must still get later events.
	testLog(t, "a page does not wait for a foreign gateway", versionLike(), func(t *logTest) {
		task := logOf("t", 1)
		t.page("a", task)
		t.buffered("a t-1.x-0 t")
		task.Append("t", false)
		time.Sleep(openPause)
		t.rest()
		t.buffered("a t-2.x-0 t")
		time.Sleep(openLimit)
		t.rest()
		t.connTest.ok("a ?")
		t.wantUnderWay()
	})
}

// A browser that leaves within a second may not have read a byte. Its next stream gets the same events again.
func TestFollowerOfVersionResendsWhatAYoungConnectionGot(t *testing.T) {
	for name, test := range map[string]struct {
		end  func(t *logTest)
		want string // the event after which the next connection begins
	}{
		"left at once":         {func(t *logTest) { t.onDisconnect("a") }, "x-0"},
		"left within a second": {func(t *logTest) { time.Sleep(settleTime - 1); t.onDisconnect("a") }, "x-0"},
		"left after a second":  {func(t *logTest) { time.Sleep(settleTime); t.onDisconnect("a") }, "x-1"},
		"replaced at once":     {func(t *logTest) {}, "x-0"},
		"replaced later":       {func(t *logTest) { time.Sleep(settleTime) }, "x-1"},
		"lost at once": {func(t *logTest) { // the gateway crashed, and the backend learns of it much later
			time.Sleep(time.Hour)
			t.sweep(0)
			t.notFound("a ?")
		}, "x-0"},
		"lost after a sweep": {func(t *logTest) {
			time.Sleep(settleTime)
			t.sweep(0)
			t.connTest.ok("a ?")
			t.sweep(0)
			t.notFound("a ?")
		}, "x-1"},
		"lost after a later event": {func(t *logTest) { // whose answer shows that the stream is still open
			time.Sleep(settleTime)
			t.append("two")
			t.connTest.ok("a x-2 two")
			t.append("three")
			t.notFound("a x-3 three")
		}, "x-2"},
	} {
		testLog(t, name, versionLike(), func(t *logTest) {
			t.append("one")
			t.follow(connectRequest{token: "a"})
			t.connTest.ok("a x-1 one")
			test.end(t)
			t.connect("b", "", test.want)
		})
	}
}

func TestFollowerGives(t *testing.T) {
	// An event that is not on disk yet is not delivered, even if a later call published an earlier one.
	testLog(t, "what is published", taskLike(), func(t *logTest) {
		t.follow(connectRequest{token: "a"})
		first := t.events.Add(entry{data: "one"})
		t.events.Add(entry{data: "two"})
		t.events.Publish(first, "")
		t.rest()
		t.delivers("a x-1 one")
		if got := t.events.After("", 9); len(got) != 1 {
			t.Errorf("got %d events to show, want 1", len(got))
		}
		t.events.Publish(first+1, "task_completed")
		t.rest()
		t.delivers("a x-2 two", closing("a", "task_completed"))
	})

	// An event given to a replaced connection does not count as delivered.
	testLog(t, "nothing once it is replaced", versionLike(), func(t *logTest) {
		t.follow(connectRequest{token: "a"})
		t.append("one")
		t.follow(connectRequest{token: "b"})
		t.connTest.ok("a x-1 one")
		if t.events.given != 0 {
			t.Error("an event that a replaced connection was given counts as delivered")
		}
	})

	// A refused event is skipped. Otherwise it would be replayed and refused forever.
	testLog(t, "nothing that is refused", taskLike(), func(t *logTest) {
		t.begin("one", "two")
		t.answer("a x-1 one", sendResult{taken: 1, refused: 1})
		t.delivers("a x-2 two")
		if log := t.log.String(); strings.Count(log, "level=ERROR") != 1 {
			t.Errorf("got log %s\nwant one error", log)
		}
	})
}

// page connects a page that follows other logs, then the log. Event IDs have the position in each: "a t-1.x-0 t" gives
// stream a the first event of the log with the epoch t.
func (t *logTest) page(token string, others ...*eventLog) {
	t.Helper()
	f := &follower{identifier: "page:1"}
	f.connect(t.conns, connectRequest{token: token}, all(append(others, t.events)...))
	t.rest()
}

// logOf makes a task log with some events. The data of each is the epoch.
func logOf(epoch string, events int) *eventLog {
	policy := taskLike()
	policy.epoch = func() string { return epoch }
	log := newEventLog(&policy)
	for range events {
		log.Append(epoch, false)
	}
	return log
}

// The answer that shows that the stream is open is also about a run. Wait must return true for an event of this run
// even if the limit has dropped it by then.
func TestRaceWaitWhileTheStreamOpens(t *testing.T) {
	t.Parallel()
	for range 100 {
		policy := versionLike()
		policy.limit, policy.dropped = 2, new(series)
		log := newEventLog(&policy)
		log.Append("1", false)
		log.Append("2", false)
		logs := []*eventLog{log}
		for i := range 1000 { // so that noting the answer takes a moment
			logs = append(logs, logOf(fmt.Sprint(i), 0))
		}
		waited := make(chan bool, 1)
		f := &follower{identifier: "page:1"}
		f.connect(newConnectionManager(senderFunc(func(events []event) sendResult {
			switch {
			case len(events) > 0 && events[0].Data == "1":
				return sendResult{taken: 1, buffered: true}
			case len(events) > 0 && events[0].Data == "2":
				go func() { waited <- log.Wait(t.Context(), 2) }()
				log.Append("3", false)
				log.Append("4", false)
				time.Sleep(time.Millisecond)
				return sendResult{taken: 1}
			}
			return sendResult{taken: len(events)}
		}), slog.New(slog.DiscardHandler), unreadMetrics()), connectRequest{token: "a"}, all(logs...))
		if !<-waited {
			t.Fatal("Wait returned false for an event that an open stream was given")
		}
	}
}

// An event may be dropped while it is under way to a connection that then ends. It counts as dropped only if its send
// fails.
func TestFollowerDropsWhatWasUnderWayToNobody(t *testing.T) {
	for name, answer := range map[string]sendResult{"taken": {taken: 1}, "failed": {err: errUnknownToken}} {
		testLog(t, name, limited(versionLike(), 1), func(t *logTest) {
			t.begin("one")
			t.append("two")
			t.onDisconnect("a")
			t.answer("a x-1 one", answer)
			t.wantDropped(1 - answer.taken) // what was taken has perhaps arrived
		})
	}
}

// The races. Each test is an order of steps that the network and the scheduler may choose.

func TestRaceConnectDuringSend(t *testing.T) {
	for name, answer := range map[string]func(t *logTest, send string){
		"ok":       func(t *logTest, send string) { t.ok(send) },
		"buffered": func(t *logTest, send string) { t.buffered(send) },
		"fails":    func(t *logTest, send string) { t.fails(send) },
	} {
		testLog(t, name, versionLike(), func(t *logTest) {
			t.begin("one", "two")
			t.connect("b", "", "x-0")
			t.wantUnderWay("a x-1 one", closing("a", "replaced"), "b x-1 one")
			answer(t, "a x-1 one") // this does not affect b, and a gets no more
			t.delivers(closing("a", "replaced"), "b x-1 one", "b x-2 two")
		})
	}
}

// While the lost event is the last there is no gap, so the stream stays until there is more to send or until the sweep.
func TestRaceTimeoutOfTheNewestEvent(t *testing.T) {
	for name, next := range map[string]func(t *logTest){
		"event": func(t *logTest) { t.append("two") },
		"end":   func(t *logTest) { t.end("task_completed") },
		"sweep": func(t *logTest) { t.sweep(0) },
	} {
		testLog(t, name, taskLike(), func(t *logTest) {
			t.begin("one")
			t.fails("a x-1 one")
			t.wantUnderWay()
			next(t)
			t.delivers("a end")
		})
	}
}

// The model. Event logs and their followers run against a simulated network, gateway and browsers, which do at random
// whatever real ones may do. A browser that gets an event twice, out of order or after a gap fails the test at once.
//
// After a timeout only the browser knows whether the gateway took an event. So its stream is ended, and it comes back
// with the ID of the last event it has. Appending never waits for the network.
//
// The life of a stream is a sequence of methods of world: connect (the browser asks for it), arrives (the backend gets
// the connect callback), opens (the gateway gets the answer), read, ends, and disconnect (the backend gets the
// disconnect callback). A send of the backend takes two steps: perform and reply.
//
// Streams have the tokens t0, t1 and so on. The first log has the epoch x, the further logs of a page a, b and so on.
// The data of an event is the epoch of its log, so a browser can tell which position in the event ID must move on.

// world is a gateway, its streams, and the browsers that follow one identifier: one log or, as a page, several.
type world struct {
	*logTest
	logs        []*eventLog // the first is logTest.events
	rand        *rand.Rand
	pages       int // how many pages may be loaded besides the first
	browsers    []*simBrowser
	run         int // how often the gateway has crashed
	streams     []*simStream
	performed   map[*stepped]sendResult // sends that the gateway has performed but not answered
	late        []*stepped              // sends that failed, but that the gateway may still perform
	disconnects []*simStream            // those with a disconnect callback under way
}

// promptly is the longest that a browser takes to read, the answer to a callback to arrive, or a disconnect callback to
// be made, if it is made at all. All three together take less than settleTime.
const promptly = settleTime / 4

// simBrowser is a page with an EventSource. Its last event ID tells what it has of each log.
type simBrowser struct {
	t      *testing.T
	stream *simStream        // nil after its end, until the browser reconnects
	lastID string            // last event ID
	has    map[string]uint64 // the positions in lastID, or in the one before connection_close
	reason string            // data of connection_close; the browser does not come back after it
}

func (b *simBrowser) follows() bool { return b.stream != nil }
func (b *simBrowser) away() bool    { return b.stream == nil && b.reason == "" }
func (b *simBrowser) loses()        { b.stream = nil }

// receive takes the next event of the stream, and checks that it is the one that must follow.
func (b *simBrowser) receive(e event) {
	had, has := parsePositions(b.lastID), parsePositions(e.ID)
	if e.ID == closeID {
		b.reason = e.Data
	} else {
		b.has = has
	}
	for _, log := range b.stream.logs {
		before, known := had[log.epoch]
		after := has[log.epoch]
		switch {
		case e.ID == closeID:
		case e.Name == "connection_open" && (after == before || !known && !log.policy.replay):
		case e.Name != "connection_open" && after == before && e.Data != log.epoch: // an event of another log
		case e.Name != "connection_open" && after == before+1 && e.Data == log.epoch: // the next event of this log
		default:
			b.t.Errorf("a browser that has %s gets %s %s %s", b.lastID, e.ID, e.Name, e.Data)
		}
	}
	b.lastID = e.ID
}

// simStream is a stream as the gateway knows it.
type simStream struct {
	token    string
	browser  *simBrowser // may have left without the gateway noticing
	logs     []*eventLog
	request  connectRequest
	sent     bool      // the connect callback has reached the backend
	answered time.Time // when the backend decided
	err      error     // its refusal
	first    event     // its answer: the event that begins the stream
	end      bool      // its answer ends the stream
	opened   time.Time // when the answer reached the gateway
	buffer   []event   // held back until the stream opens
	wire     []event   // written, but not read by the browser
	written  []string  // IDs of all events written, without connection_open
	ending   bool      // ends once the buffer is written
	ended    time.Time // when it ended
}

func (s *simStream) gone() bool     { return !s.ended.IsZero() }
func (s *simStream) isOpen() bool   { return !s.opened.IsZero() && !s.gone() }
func (s *simStream) opening() bool  { return s.opened.IsZero() && !s.gone() }
func (s *simStream) waits() bool    { return s.opening() && !s.answered.IsZero() }
func (s *simStream) left() bool     { return !s.gone() && s.browser.stream != s }
func (s *simStream) unread() bool   { return s.isOpen() && len(s.wire) > 0 }
func (s *simStream) underWay() bool { return !s.sent }

// newWorld makes a world with a log of this policy, and with the logs of some tasks.
func newWorld(t *testing.T, policy logPolicy, tasks int, seed uint64) *world {
	w := &world{
		logTest:   newLogTest(newConnTest(t), policy),
		rand:      rand.New(rand.NewPCG(seed, 0)),
		browsers:  []*simBrowser{{t: t}},
		performed: map[*stepped]sendResult{},
	}
	w.gateway.batches = seed%2 == 1
	if seed%4 > 1 {
		w.pages = 1000
	}
	w.logs = append(w.logs, w.events)
	for i := range tasks {
		epoch := string(rune('a' + i))
		task := taskLike()
		task.epoch = func() string { return epoch }
		w.logs = append(w.logs, newEventLog(&task))
	}
	return w
}

// connect has b ask the gateway for a stream. The connect callback arrives some time later.
func (w *world) connect(b *simBrowser) {
	s := &simStream{token: fmt.Sprint("t", len(w.streams)), browser: b}
	order := parseOrder(fmt.Sprint("run", w.run, "-", len(w.streams)))
	s.request = connectRequest{token: s.token, lastEventID: b.lastID, order: order, probes: true}
	s.logs = w.logs[:1]
	for _, log := range w.logs[1:] { // another set of tasks each time
		if w.rand.IntN(3) > 0 {
			s.logs = append(slices.Clip(s.logs), log)
		}
	}
	w.streams = append(w.streams, s)
	b.stream = s
}

// follow makes a stream the connection.
func (w *world) follow(s *simStream) (open event, end bool, err error) {
	f := &follower{identifier: "task:1"}
	return f.connect(w.conns, s.request, all(s.logs...))
}

// arrives lets the connect callback reach the backend, which may have to ask the gateway before it decides.
func (w *world) arrives(s *simStream) {
	s.sent = true
	go func() {
		open, end, err := w.follow(s)
		for err == errAskFirst && w.conns.Ask("task:1", &s.request) {
			open, end, err = w.follow(s)
		}
		s.first, s.end, s.err, s.answered = open, end, err, time.Now()
		for n := range parsePositions(open.ID)["x"] {
			if err == nil && s.request.lastEventID == "" && !w.received(n+1) {
				w.Errorf("%s begins after %s, but nobody got %d", s.token, open.ID, n+1)
			}
		}
	}()
	w.rest()
}

// received reports whether a browser has event n, or had the time to read it from its stream.
func (w *world) received(n uint64) bool {
	for _, b := range w.browsers {
		if b.has["x"] >= n {
			return true
		}
	}
	return slices.ContainsFunc(w.streams, func(s *simStream) bool {
		end := s.ended
		if end.IsZero() {
			end = time.Now()
		}
		wrote := slices.ContainsFunc(s.written, func(id string) bool { return parsePositions(id)["x"] == n })
		return wrote && end.Sub(s.opened) >= promptly
	})
}

// opens lets the answer to the connect callback reach the gateway.
func (w *world) opens(s *simStream) {
	if s.err != nil { // the browser comes back
		w.breaks(s)
		return
	}
	s.opened = time.Now()
	for _, e := range append([]event{s.first}, s.buffer...) {
		w.write(s, e)
	}
	if s.ending || s.end {
		w.ends(s)
	}
}

// write puts an event on an open stream.
func (w *world) write(s *simStream, e event) {
	if e.Name != "connection_open" {
		s.written = append(s.written, e.ID)
	}
	s.wire = append(s.wire, e)
}

// read lets the browser read what was written.
func (w *world) read(s *simStream) {
	for _, e := range s.wire {
		if s.browser.stream == s {
			s.browser.receive(e)
		}
		if w.pages == 0 && strings.Contains(e.Data, "replaced") && s.browser.stream == s {
			w.Errorf("%s was replaced, but there is no other page", s.token)
		}
	}
	s.wire = nil
}

// breaks ends a stream. The browser may first read what was written. If the stream was open, the gateway tells the
// backend.
func (w *world) breaks(s *simStream) {
	if w.rand.IntN(2) == 0 {
		w.read(s)
	}
	s.ended = time.Now()
	if s.browser.stream == s {
		s.browser.stream = nil
	}
	if !s.opened.IsZero() {
		w.disconnects = append(w.disconnects, s)
	}
}

// ends is breaks after the browser has read everything.
func (w *world) ends(s *simStream) {
	w.read(s)
	w.breaks(s)
}

// crash kills the gateway: what it knew is gone, but what it had written may still arrive.
func (w *world) crash() {
	for _, s := range w.streams {
		if !s.gone() {
			w.breaks(s)
		}
	}
	w.disconnects = nil
	w.run++
}

// pass lets d pass. What would then have taken longer than promptly happens first, or not at all.
func (w *world) pass(d time.Duration) {
	now := time.Now().Add(d)
	for _, s := range w.streams {
		if s.waits() && now.Sub(s.answered) > promptly {
			if w.rand.IntN(2) == 0 {
				w.opens(s)
			} else { // the gateway has given up the callback
				w.breaks(s)
			}
		}
		if s.unread() && now.Sub(s.opened) > promptly {
			w.read(s)
		}
	}
	for _, s := range slices.Clone(w.disconnects) {
		if now.Sub(s.ended) > promptly {
			w.disconnect(s)
		}
	}
	time.Sleep(d)
	w.rest()
}

// disconnect lets a disconnect callback arrive, or loses it.
func (w *world) disconnect(s *simStream) {
	w.disconnects = slices.DeleteFunc(w.disconnects, func(other *simStream) bool { return other == s })
	if w.rand.IntN(4) > 0 {
		w.onDisconnect(s.token)
	}
}

// perform has the gateway perform a send, and returns its answer.
func (w *world) perform(p *stepped) (r sendResult) {
	s := w.streams[slices.IndexFunc(w.streams, func(s *simStream) bool { return s.token == p.token })]
	for i, e := range p.events {
		switch n := w.rand.IntN(20); { // what may happen between the events of a batch
		case i > 0 && n == 0 && s.isOpen():
			w.breaks(s)
		case i > 0 && n < 3 && s.waits():
			w.opens(s)
		}
		switch {
		case s.gone() || s.ending:
			r.err = errUnknownToken
			return r
		case s.isOpen():
			w.write(s, e)
		default:
			s.buffer = append(s.buffer, e)
		}
		r.taken, r.buffered = i+1, !s.isOpen()
	}
	switch {
	case s.gone() || s.ending:
		r.err = errUnknownToken
	case s.isOpen() && p.end:
		w.ends(s)
	case p.end:
		s.ending = true
	}
	r.buffered = r.err == nil && s.opening()
	return r
}

// reply answers a send, with what the gateway did or with an error.
func (w *world) reply(p *stepped, r sendResult) {
	delete(w.performed, p)
	w.gateway.reply(p, r)
	w.rest()
}

// step lets one thing happen, at random.
func (w *world) step() {
	switch n := w.rand.IntN(100); {
	case n < 5:
		log := w.logs[w.rand.IntN(len(w.logs))]
		log.Append(log.epoch, false)
		w.rest()
	case n < 6: // the page is loaded again, or in another tab
		if len(w.browsers) <= w.pages {
			b := &simBrowser{t: w.T}
			w.browsers = append(w.browsers, b)
			w.connect(b)
		}
	case n < 16:
		toOne(w.rand, w.browsers, (*simBrowser).away, w.connect)
	case n < 24: // any callback under way, as they overtake each other
		toOne(w.rand, w.streams, (*simStream).underWay, w.arrives)
	case n < 32:
		toOne(w.rand, w.streams, (*simStream).waits, w.opens)
	case n < 34: // the gateway gives up a callback, which may still reach the backend
		toOne(w.rand, w.streams, (*simStream).opening, w.breaks)
	case n < 40:
		toOne(w.rand, w.streams, (*simStream).unread, w.read)
	case n < 43: // a browser loses its stream
		toOne(w.rand, w.browsers, (*simBrowser).follows, (*simBrowser).loses)
	case n < 48: // and the gateway notices, perhaps much later
		toOne(w.rand, w.streams, (*simStream).left, w.breaks)
	case n < 52:
		toOne(w.rand, w.disconnects, (*simStream).gone, w.disconnect)
	case n < 55:
		w.pass(openPause)
	case n < 57:
		w.pass(settleTime)
	case n < 58:
		w.crash()
	case n < 60:
		w.sweep(0)
	case n < 63: // the gateway performs a send that nobody waits for any more
		if len(w.late) > 0 {
			w.perform(w.late[0])
			w.late = w.late[1:]
		}
	default:
		toOne(w.rand, w.gateway.all(), func(*stepped) bool { return true }, w.travels)
	}
}

// travels takes a send one step further: the gateway performs it, or it is answered, or it fails.
func (w *world) travels(p *stepped) {
	answer, done := w.performed[p]
	switch fails := w.rand.IntN(10) == 0; {
	case fails && done:
		w.reply(p, sendResult{err: errNoAnswer})
	case fails: // also stands for a 404 that is not the gateway's own
		w.late = append(w.late, p)
		w.reply(p, sendResult{err: errNoAnswer})
	case done:
		w.reply(p, answer)
	default:
		w.performed[p] = w.perform(p)
	}
}

// calm lets everything succeed until no browser is away and nothing is under way.
func (w *world) calm() {
	for range 200 {
		w.sweep(0)
		for _, s := range w.streams {
			if s.underWay() {
				w.arrives(s)
			}
		}
		for all := w.gateway.all(); len(all) > 0; all = w.gateway.all() {
			answer, done := w.performed[all[0]]
			if !done {
				answer = w.perform(all[0])
			}
			w.reply(all[0], answer)
		}
		for _, s := range w.streams {
			switch {
			case s.left():
				w.breaks(s)
			case s.waits():
				w.opens(s)
			}
			w.read(s)
		}
		for _, s := range w.disconnects {
			w.onDisconnect(s.token)
		}
		w.disconnects = nil
		cameBack := toOne(w.rand, w.browsers, (*simBrowser).away, w.connect)
		time.Sleep(openPause)
		w.rest()
		if !cameBack && len(w.gateway.all()) == 0 && !slices.ContainsFunc(w.streams, (*simStream).opening) {
			return
		}
	}
	w.Fatal("the world does not come to rest")
}

// toOne does something to one of all that are good, at random. It reports whether there was one.
func toOne[T any](r *rand.Rand, all []*T, good func(*T) bool, do func(*T)) bool {
	all = slices.DeleteFunc(slices.Clone(all), func(x *T) bool { return !good(x) })
	if len(all) == 0 {
		return false
	}
	do(all[r.IntN(len(all))])
	return true
}

// check checks that every browser has everything, except those that another one has replaced.
func (w *world) check() {
	complete := 0
	for _, b := range w.browsers {
		current := b.follows() && w.conns.tokens[b.stream.token] != nil
		if !current && !strings.Contains(b.reason, "task_completed") {
			continue
		}
		if current && w.events.reason != "" {
			w.Error("a browser still waits for the end")
		}
		for _, log := range w.logs {
			follows := current && slices.Contains(b.stream.logs, log) || !current && log == w.events
			if follows && b.has[log.epoch] != log.last {
				w.Errorf("a browser has %v, but the last event is %s", b.has, log.id(log.last))
			}
		}
		complete++
	}
	if complete == 0 {
		w.Error("no browser got to the end")
	}
}

// tries returns how often a random test is to be tried: n times, or less under the race detector, or as often as the
// environment says.
func tries(name string, n uint64) uint64 {
	if underRace {
		n /= 10
	}
	if set, err := strconv.ParseUint(os.Getenv(name), 10, 64); err == nil {
		n = set
	}
	return n
}

// SIDECAST_SEEDS sets the number of worlds of each kind, for a longer run.
func TestDeliveryModel(t *testing.T) {
	t.Parallel()
	const steps = 400
	for seed := range tries("SIDECAST_SEEDS", 2000) {
		for _, kind := range []struct {
			name   string
			policy logPolicy
			tasks  int
		}{{"task", taskLike(), 0}, {"version", versionLike(), 0}, {"page", versionLike(), 4}} {
			t.Run(fmt.Sprint(kind.name, " ", seed), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					w := newWorld(t, kind.policy, kind.tasks, seed)
					for i := range steps {
						w.step()
						if log := w.logs[len(w.logs)-1]; i == steps*3/4 && log.policy.replay {
							log.End("task_completed")
							w.rest()
						}
						if t.Failed() {
							t.Fatalf("seed %d, step %d", seed, i)
						}
					}
					w.calm()
					w.check()
				})
			})
		}
	}
}

func BenchmarkAppendWithoutConnection(b *testing.B) {
	for _, policy := range []logPolicy{taskLike(), versionLike()} {
		for _, policy.limit = range []int{100, 1000} {
			b.Run(fmt.Sprint(policy.event, "/limit=", policy.limit), func(b *testing.B) {
				policy.dropped = new(series)
				o := newEventLog(&policy)
				o.Append("first", true)
				b.ReportAllocs()
				for b.Loop() {
					o.Append("data", false)
				}
			})
		}
	}
}

// The memory of an identifier that waits for its first event, with its strings and map entries.
func BenchmarkMemoryOfIdleIdentifiers(b *testing.B) {
	const identifiers = 100_000
	for _, name := range []string{"waiting", "connected"} {
		b.Run(name, func(b *testing.B) {
			policy := versionLike()
			for b.Loop() {
				before := heapInUse()
				conns := newConnectionManager(nil, slog.New(slog.DiscardHandler), unreadMetrics())
				all := make([]*eventLog, identifiers)
				for i := range all {
					id := newToken()
					all[i] = newEventLog(&policy)
					if name == "connected" {
						follow(conns, "version:"+id, connectRequest{token: newToken()}, all[i])
					}
				}
				b.ReportMetric(float64(heapInUse()-before)/identifiers, "B/identifier")
				runtime.KeepAlive(conns)
				runtime.KeepAlive(all)
			}
		})
	}
}

// heapInUse returns the bytes of the heap that are still reachable.
func heapInUse() uint64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.GC() // frees what pools held before the first
	runtime.GC() // and what waited for a finalizer
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}
