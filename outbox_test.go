package main

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// taskLike and versionLike are policies like those of the services, with a short epoch and without a limit.
func taskLike() outboxPolicy {
	return outboxPolicy{event: "task_event", epoch: "x", replay: true}
}

func versionLike() outboxPolicy {
	return outboxPolicy{event: "version", epoch: "x"}
}

// outboxTest is a connTest with an outbox. Its streams have tokens of one letter.
type outboxTest struct {
	*connTest
	outbox  *outbox
	dropped int
}

func testOutbox(t *testing.T, policy outboxPolicy, f func(t *outboxTest)) {
	t.Helper()
	testConns(t, func(t *connTest) { f(newOutboxTest(t, policy)) })
}

func newOutboxTest(t *connTest, policy outboxPolicy) *outboxTest {
	o := &outboxTest{connTest: t}
	policy.dropped = func(n int) { o.dropped += n }
	o.outbox = newOutbox("task:1", t.conns, &policy)
	return o
}

func (t *outboxTest) append(data ...string) {
	t.Helper()
	for _, d := range data {
		t.outbox.Append(d, false)
		t.rest()
	}
}

// end ends the outbox.
func (t *outboxTest) end(reason string) {
	t.Helper()
	t.outbox.End(reason)
	t.rest()
}

// keep appends an event that the limit must not drop.
func (t *outboxTest) keep(data string) {
	t.Helper()
	t.outbox.Append(data, true)
	t.rest()
}

// connect connects a stream and checks after which event it begins.
func (t *outboxTest) connect(token, lastEventID, wantOpen string) {
	t.Helper()
	open, _ := t.outbox.Connect(connectRequest{token: token, url: "/stream", lastEventID: lastEventID})
	if got := open.ID; got != wantOpen {
		t.Errorf("%s with last event ID %q: begins after %q, want %q", token, lastEventID, got, wantOpen)
	}
	t.rest()
}

// delivers lets the gateway take everything, and checks what that was: one stream after the other, each in its order.
func (t *outboxTest) delivers(want ...string) {
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

// closing is how a stream is ended for a reason.
func closing(token, reason string) string {
	return token + ` close {"reason":"` + reason + `"} end`
}

func TestOutboxNumbersEvents(t *testing.T) {
	testOutbox(t, taskLike(), func(t *outboxTest) {
		open, _ := t.outbox.Connect(connectRequest{token: "a", url: "/stream", lastEventID: ""})
		if want := (event{"x-0", "connection_open", `{"status":"connected"}`}); open != want {
			t.Errorf("begins with %q, want %q", open, want)
		}
		for want := range uint64(3) {
			if got := t.outbox.Append("data", want == 0); got != want+1 {
				t.Errorf("got number %d, want %d", got, want+1)
			}
		}
		t.rest()
		if got, want := t.gateway.underWay[0].events[0], (event{"x-1", "task_event", "data"}); got != want {
			t.Errorf("got event %q, want %q", got, want)
		}
		t.delivers("a x-1 data", "a x-2 data", "a x-3 data")
	})
}

// A browser gave up an attempt whose callback then came after that of its next one. To take the dead stream for the newer
// one would tell the only page that it was replaced.
func TestRaceCallbackOvertakesAnother(t *testing.T) {
	testOutbox(t, taskLike(), func(t *outboxTest) {
		connect := func(token, order string) (event, bool) {
			defer t.rest()
			return t.outbox.Connect(connectRequest{token: token, order: parseOrder(order)})
		}
		connect("b", "gateway-12")
		if open, end := connect("a", "gateway-9"); open != closeEvent("replaced") || !end {
			t.Errorf("the overtaken stream begins with %v and ends at once: %t; want replaced, true", open, end)
		}
		t.append("one")
		t.delivers("b x-1 one")
		connect("c", "another-1") // after the gateway restarted
		t.delivers(closing("b", "replaced"), "c x-1 one")
		connect("d", "") // a gateway that does not count
		t.delivers(closing("c", "replaced"), "d x-1 one")
	})
}

func TestOutboxWithoutNumbers(t *testing.T) {
	testOutbox(t, outboxPolicy{event: "error", replay: true}, func(t *outboxTest) {
		t.append("not found")
		t.end("task_not_found")
		t.connect("a", "-1", "") // is no ID of any event either
		t.delivers("a not found", closing("a", "task_not_found"))
	})
}

func TestOutboxOfTaskReplaysToFreshConnection(t *testing.T) {
	testOutbox(t, taskLike(), func(t *outboxTest) {
		t.append("one", "two")
		t.connect("a", "", "x-0")
		t.delivers("a x-1 one", "a x-2 two")
		t.onDisconnect("a")
		t.append("three")
		t.connect("b", "", "x-0")
		t.delivers("b x-1 one", "b x-2 two", "b x-3 three")
	})
}

func TestOutboxOfVersionStartsAtFirstUndelivered(t *testing.T) {
	testOutbox(t, versionLike(), func(t *outboxTest) {
		t.append("one", "two")
		t.connect("a", "", "x-0")
		t.ok("a x-1 one")
		t.notFound("a x-2 two")
		t.append("three")
		t.connect("b", "", "x-1")
		t.delivers("b x-2 two", "b x-3 three")
		t.onDisconnect("b")
		t.connect("c", "", "x-3")
		t.delivers()
	})
}

func TestOutboxResume(t *testing.T) {
	tests := []struct{ lastEventID, task, version string }{ // the event after which delivery goes on
		{"x-0", "x-0", "x-0"},
		{"x-1", "x-1", "x-1"},
		{"x-3", "x-3", "x-3"},
		{"x-4", "x-0", "x-3"}, // from here on it is not an event of this outbox
		{"", "x-0", "x-3"},
		{"y-1", "x-0", "x-3"}, // the backend was started again
		{"-1", "x-0", "x-3"},
		{"1", "x-0", "x-3"},
		{"x", "x-0", "x-3"},
		{"x-", "x-0", "x-3"},
		{"x--1", "x-0", "x-3"},
		{"x-+1", "x-0", "x-3"},
		{"x-1-2", "x-0", "x-3"},
		{"x-1.5", "x-0", "x-3"},
		{"x-1, x-2", "x-0", "x-3"}, // a header that stood twice
		{"x-18446744073709551616", "x-0", "x-3"},
		{"close", "x-0", "x-3"},
	}
	resume := func(t *testing.T, policy outboxPolicy, lastEventID, wantOpen string) {
		t.Run(fmt.Sprintf("%s after %q", policy.event, lastEventID), func(t *testing.T) {
			testOutbox(t, policy, func(t *outboxTest) {
				t.append("data", "data", "data")
				t.connect("a", "", "x-0")
				t.delivers("a x-1 data", "a x-2 data", "a x-3 data")
				t.onDisconnect("a")
				t.connect("b", lastEventID, wantOpen)
				rest := []string{"b x-1 data", "b x-2 data", "b x-3 data"}
				t.delivers(rest[slices.Index([]string{"x-0", "x-1", "x-2", "x-3"}, wantOpen):]...)
			})
		})
	}
	for _, test := range tests {
		resume(t, taskLike(), test.lastEventID, test.task)
		resume(t, versionLike(), test.lastEventID, test.version)
	}
}

// A successor counts from 1 again, so an ID of the one before it would name another event.
func TestOutboxOfRenewedPolicyTakesNoOldID(t *testing.T) {
	policy := taskLike()
	testOutbox(t, *policy.renewed(), func(t *outboxTest) {
		t.append("one")
		t.connect("a", "x-1", t.outbox.id(0))
	})
}

// What a browser names has arrived, also if the gateway's answer to it did not. The older ones arrived all the same.
func TestOutboxOfVersionLearnsFromLastEventID(t *testing.T) {
	testOutbox(t, versionLike(), func(t *outboxTest) {
		t.append("one", "two", "three")
		t.connect("a", "x-2", "x-2")
		t.notFound("a x-3 three")
		t.connect("b", "x-1", "x-1")
		t.notFound("b x-2 two")
		t.connect("c", "", "x-2")
		t.delivers("c x-3 three")
	})
}

// A backlog goes out in runs, more at once with each that was taken.
func TestOutboxRuns(t *testing.T) {
	testOutbox(t, taskLike(), func(t *outboxTest) {
		t.gateway.batches = true
		t.append("1", "2", "3", "4", "5", "6")
		t.end("task_completed")
		t.connect("a", "", "x-0")
		t.delivers("a x-1 1", "a x-2 2 x-3 3", "a x-4 4 x-5 5 x-6 6", closing("a", "task_completed"))
	})
}

func TestOutboxBoundsItsRuns(t *testing.T) {
	testOutbox(t, versionLike(), func(t *outboxTest) {
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

// What the gateway took of a run is with the browser, whatever became of the rest.
func TestOutboxRunTakenInPart(t *testing.T) {
	for name, test := range map[string]struct {
		answer   sendResult
		underWay []string
	}{
		"the stream has ended": {sendResult{taken: 1, err: errUnknownToken}, nil},
		"in doubt":             {sendResult{taken: 1, err: errNoAnswer}, []string{"a end"}},
		"one at a time":        {sendResult{taken: 1}, []string{"a x-3 3 x-4 4"}},
	} {
		t.Run(name, func(t *testing.T) {
			testOutbox(t, versionLike(), func(t *outboxTest) {
				t.gateway.batches = true
				t.append("1", "2", "3", "4")
				t.connect("a", "", "x-0")
				t.ok("a x-1 1")
				t.answer("a x-2 2 x-3 3", test.answer)
				t.wantUnderWay(test.underWay...)
				t.connect("b", "", "x-2")
			})
		})
	}
}

// The gateway may take what is under way, so it is not dropped before that is known.
func TestOutboxKeepsWhatIsUnderWay(t *testing.T) {
	for name, test := range map[string]struct {
		answer  sendResult
		dropped int
		arrived bool
	}{
		"taken":  {sendResult{taken: 2}, 1, true},
		"failed": {sendResult{err: errNoAnswer}, 3, false},
	} {
		t.Run(name, func(t *testing.T) {
			policy := versionLike()
			policy.limit = 3
			testOutbox(t, policy, func(t *outboxTest) {
				t.gateway.batches = true
				t.append("1", "2", "3")
				t.connect("a", "", "x-0")
				t.ok("a x-1 1")
				waited := make(chan bool, 1)
				go func() { waited <- t.outbox.Wait(t.Context(), 3) }()
				t.append("4", "5", "6", "7")
				if t.dropped != 1 {
					t.Errorf("dropped %d with two under way, want 1", t.dropped)
				}
				t.answer("a x-2 2 x-3 3", test.answer)
				if t.dropped != test.dropped {
					t.Errorf("dropped %d, want %d", t.dropped, test.dropped)
				}
				if got := <-waited; got != test.arrived {
					t.Errorf("waited for the last of them: got %t, want %t", got, test.arrived)
				}
			})
		})
	}
}

// Something between may repeat a callback. What the first one began must not stand in the way of the second.
func TestOutboxSameTokenAgain(t *testing.T) {
	testOutbox(t, taskLike(), func(t *outboxTest) {
		t.append("one")
		t.connect("a", "", "x-0")
		t.notFound("a x-1 one")
		t.connect("a", "", "x-0")
		t.delivers("a x-1 one")
	})
}

func TestOutboxLimit(t *testing.T) {
	policy := taskLike()
	policy.limit = 3
	testOutbox(t, policy, func(t *outboxTest) {
		t.keep("first")
		t.append("2", "3", "4", "5")
		if got, want := t.dropped, 2; got != want {
			t.Errorf("dropped %d, want %d", got, want)
		}
		t.keep("last")
		t.connect("a", "", "x-0")
		t.delivers("a x-1 first", "a x-5 5", "a x-6 last")
		t.onDisconnect("a")

		t.keep("very last")
		t.keep("the end")                           // there is nothing more that may go
		if got, want := t.dropped, 3; got != want { // the fifth had been delivered when it went
			t.Errorf("dropped %d, want %d", got, want)
		}
		t.connect("b", "x-2", "x-2") // was dropped, but the order still tells where to go on
		t.delivers("b x-6 last", "b x-7 very last", "b x-8 the end")
	})
}

// What an open stream was given is not dropped when it goes, though a reload would have liked to see it again.
func TestOutboxDropsNothingThatWasGiven(t *testing.T) {
	policy := taskLike()
	policy.limit = 2
	testOutbox(t, policy, func(t *outboxTest) {
		t.append("1", "2")
		t.connect("a", "", "x-0")
		t.delivers("a x-1 1", "a x-2 2")
		t.onDisconnect("a")
		t.connect("b", "", "x-0")
		t.append("3")
		if t.dropped != 0 {
			t.Errorf("dropped %d, want 0", t.dropped)
		}
		t.delivers("b x-1 1", "b x-2 2", "b x-3 3")
	})
}

// What was held back for a stream that never opened was given to nobody.
func TestOutboxDropsWhatWasHeldBackAndLost(t *testing.T) {
	policy := versionLike()
	policy.limit = 2
	testOutbox(t, policy, func(t *outboxTest) {
		t.append("1", "2")
		t.connect("a", "", "x-0")
		t.buffered("a x-1 1")
		t.buffered("a x-2 2")
		t.notFound("a ?")
		t.append("3", "4")
		if t.dropped != 2 {
			t.Errorf("dropped %d, want 2", t.dropped)
		}
		t.connect("b", "", "x-0")
		t.delivers("b x-3 3", "b x-4 4")
	})
}

// What a browser is resuming with is still needed.
func TestOutboxShedsNothingUnderWay(t *testing.T) {
	testOutbox(t, versionLike(), func(t *outboxTest) {
		t.append("1", "2", "3")
		t.connect("a", "", "x-0")
		t.delivers("a x-1 1", "a x-2 2", "a x-3 3")
		t.onDisconnect("a")
		t.connect("b", "x-0", "x-0")
		t.ok("b x-1 1")
		t.outbox.Shed()
		t.delivers("b x-2 2", "b x-3 3")
	})
}

// The limit is for events that a fresh connection would get. What was delivered does not push those out.
func TestOutboxOfVersionLimit(t *testing.T) {
	policy := versionLike()
	policy.limit = 2
	testOutbox(t, policy, func(t *outboxTest) {
		t.connect("a", "", "x-0")
		for i := range 5 {
			t.append("data")
			t.delivers(fmt.Sprintf("a x-%d data", i+1))
		}
		t.onDisconnect("a")
		t.append("six", "seven")
		if t.dropped != 0 {
			t.Errorf("dropped %d of at most 2", t.dropped)
		}
		t.append("eight")
		if t.dropped != 1 {
			t.Errorf("dropped %d of 3, want 1", t.dropped)
		}
		t.connect("b", "", "x-5")
		t.delivers("b x-7 seven", "b x-8 eight")
	})
}

// The gateway may have taken as many as may wait at once, and the browser none of them.
func TestOutboxOfVersionKeepsWhatWasTaken(t *testing.T) {
	policy := versionLike()
	policy.limit = 4
	testOutbox(t, policy, func(t *outboxTest) {
		t.append("1", "2", "3", "4")
		t.connect("a", "", "x-0")
		t.delivers("a x-1 1", "a x-2 2", "a x-3 3", "a x-4 4")
		t.onDisconnect("a")
		t.append("5")
		t.connect("b", "x-0", "x-0")
		t.delivers("b x-1 1", "b x-2 2", "b x-3 3", "b x-4 4", "b x-5 5")
		t.onDisconnect("b")
		t.connect("c", "x-0", "x-0")
		t.delivers("c x-2 2", "c x-3 3", "c x-4 4", "c x-5 5")
		t.onDisconnect("c")
		t.connect("d", "x-4", "x-4")
		t.delivers("d x-5 5")
	})
}

func TestOutboxSize(t *testing.T) {
	testOutbox(t, versionLike(), func(t *outboxTest) {
		want := func(kept, waiting, bytes int) {
			t.Helper()
			if k, w, b := t.outbox.Size(); k != kept || w != waiting || b != bytes {
				t.Errorf("got %d kept, %d waiting, %d bytes, want %d, %d, %d", k, w, b, kept, waiting, bytes)
			}
		}
		want(0, 0, 0)
		t.append("one", "two")
		t.outbox.AppendShared("shared")
		t.append("four")
		want(4, 4, 24)
		t.connect("a", "", "x-0")
		t.ok("a x-1 one")
		want(4, 3, 24)
		t.outbox.Shed()
		want(3, 3, 16)
		t.delivers("a x-2 two", "a x-3 shared", "a x-4 four")
		want(3, 0, 16)
		t.outbox.Shed()
		want(0, 0, 0)
	})
}

func TestOutboxEnd(t *testing.T) {
	testOutbox(t, taskLike(), func(t *outboxTest) {
		t.connect("a", "", "x-0")
		t.append("one", "two")
		t.end("task_completed")
		t.delivers("a x-1 one", "a x-2 two", closing("a", "task_completed"))
		if got := t.outbox.Append("three", true); got != 0 {
			t.Errorf("got number %d after the end", got)
		}
		t.rest()
		t.delivers()
	})
}

func TestOutboxEndAtOnceForWhoHasEverything(t *testing.T) {
	testOutbox(t, taskLike(), func(t *outboxTest) {
		t.append("one")
		t.end("task_failed")
		t.connect("a", "x-1", "x-1")
		t.delivers(closing("a", "task_failed"))
		t.onDisconnect("a")
		t.connect("b", "", "x-0") // a page that was loaded again
		t.delivers("b x-1 one", closing("b", "task_failed"))
		t.onDisconnect("b")
		t.connect("c", "x-1", "x-1")
		t.delivers(closing("c", "task_failed"))
	})
}

func TestOutboxEndWhileIdle(t *testing.T) {
	testOutbox(t, taskLike(), func(t *outboxTest) {
		t.append("one")
		t.connect("a", "x-1", "x-1")
		t.delivers()
		t.end("task_cancelled")
		t.delivers(closing("a", "task_cancelled"))
	})
}

// An end that is due already is the next event, and there is no other that could come.
func TestOutboxEndBehindFailure(t *testing.T) {
	testOutbox(t, taskLike(), func(t *outboxTest) {
		t.append("one")
		t.connect("a", "", "x-0")
		t.end("task_completed")
		t.fails("a x-1 one")
		t.wantUnderWay("a end")
	})
}

// The end itself may fail to arrive. The browser comes back for it.
func TestOutboxEndAgainAfterFailure(t *testing.T) {
	testOutbox(t, taskLike(), func(t *outboxTest) {
		t.connect("a", "", "x-0")
		t.end("task_completed")
		t.fails(closing("a", "task_completed"))
		t.wantUnderWay()
		go t.conns.sweep(0)
		t.rest()
		t.ok("a end")
		t.onDisconnect("a")
		t.connect("b", "x-0", "x-0")
		t.delivers(closing("b", "task_completed"))
	})
}

// waited is what came of waiting for an event, and after how long.
type waited struct {
	given bool
	after time.Duration
}

// wait waits for event n, for a second at most.
func (t *outboxTest) wait(n uint64) <-chan waited {
	t.Helper()
	result := make(chan waited, 1)
	go func() {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		start := time.Now()
		given := t.outbox.Wait(ctx, n)
		result <- waited{given, time.Since(start)}
	}()
	t.rest()
	return result
}

func (t *outboxTest) wantWaited(result <-chan waited, want waited) {
	t.Helper()
	if got := <-result; got != want {
		t.Errorf("got %t after %s, want %t after %s", got.given, got.after, want.given, want.after)
	}
}

func TestOutboxWait(t *testing.T) {
	testOutbox(t, versionLike(), func(t *outboxTest) {
		t.append("one")
		t.wantWaited(t.wait(1), waited{false, 0}) // nobody is there
		t.connect("a", "", "x-0")
		result := t.wait(1)
		t.ok("a x-1 one")
		t.wantWaited(result, waited{true, 0})
		t.wantWaited(t.wait(1), waited{true, 0})

		t.append("two")
		t.wantWaited(t.wait(2), waited{false, time.Second})
		result = t.wait(2)
		t.notFound("a x-2 two")
		t.wantWaited(result, waited{false, 0})

		t.connect("b", "", "x-1")
		result = t.wait(2)
		t.fails("b x-2 two")
		t.wantWaited(result, waited{false, 0})

		t.connect("c", "", "x-1")
		result = t.wait(2)
		t.connect("d", "", "x-1")
		t.ok("d x-2 two")
		t.wantWaited(result, waited{true, 0})
		t.connect("e", "x-0", "x-0") // gets both again
		t.wantWaited(t.wait(2), waited{true, 0})
	})
}

// A browser that comes back with the event's ID has it, and then nothing is sent that could end the wait.
func TestOutboxWaitUntilTheBrowserNamesTheEvent(t *testing.T) {
	testOutbox(t, versionLike(), func(t *outboxTest) {
		t.connect("a", "", "x-0")
		t.append("one")
		result := t.wait(1)
		t.connect("b", "x-1", "x-1")
		t.wantWaited(result, waited{true, 0})
	})
}

// An event that was dropped comes to nobody, even if the later ones do.
func TestOutboxWaitForDroppedEvent(t *testing.T) {
	policy := versionLike()
	policy.limit = 1
	testOutbox(t, policy, func(t *outboxTest) {
		t.connect("a", "", "x-0")
		t.append("one", "two")
		result := t.wait(2)
		t.append("three")
		t.wantWaited(result, waited{false, 0})
	})
}

// The event behind those that were held back is not sent while it is unknown what became of them. It must not be waited
// for in vain when they are lost.
func TestOutboxWaitBehindWhatWasHeldBackAndLost(t *testing.T) {
	testOutbox(t, versionLike(), func(t *outboxTest) {
		t.append("one")
		t.connect("a", "", "x-0")
		t.buffered("a x-1 one")
		t.append("two")
		result := t.wait(2)
		t.notFound("a ?")
		t.wantWaited(result, waited{false, 0})
	})
}

// What the gateway holds back is with the browser only when its stream has opened.
func TestOutboxWaitUntilTheStreamOpens(t *testing.T) {
	testOutbox(t, versionLike(), func(t *outboxTest) {
		t.append("one")
		t.connect("a", "", "x-0")
		result := t.wait(1)
		t.buffered("a x-1 one")
		t.notFound("a ?")
		t.wantWaited(result, waited{false, 0})
		t.connect("b", "", "x-0")
		result = t.wait(1)
		t.buffered("b x-1 one")
		t.ok("b ?")
		t.wantWaited(result, waited{true, 0})
	})
}

// While the connect callback is under way the gateway holds events back. If the browser leaves before its stream opens,
// it never had them.
func TestOutboxOfVersionSendsAgainWhatWasHeldBackAndLost(t *testing.T) {
	testOutbox(t, versionLike(), func(t *outboxTest) {
		t.append("one", "two")
		t.connect("a", "", "x-0")
		t.buffered("a x-1 one")
		t.buffered("a x-2 two")
		t.buffered("a ?")
		t.wantUnderWay()
		time.Sleep(openPause)
		t.rest()
		t.notFound("a ?")
		t.wantConnections()
		t.connect("b", "", "x-0")
		t.delivers("b x-1 one", "b x-2 two")
		t.onDisconnect("b")
		t.connect("c", "", "x-2")
	})
}

func TestOutboxOfVersionAsksWhetherTheStreamOpened(t *testing.T) {
	testOutbox(t, versionLike(), func(t *outboxTest) {
		t.append("one")
		t.connect("a", "", "x-0")
		t.buffered("a x-1 one")
		t.append("two")
		t.wantUnderWay("a ?")
		t.ok("a ?")
		t.onDisconnect("a")
		t.notFound("a x-2 two")
		t.connect("b", "", "x-1")
		t.delivers("b x-2 two")
	})
}

// No connect callback takes longer than this. An answer that stays the same is not waited for.
func TestOutboxOfVersionAsksForALimitedTime(t *testing.T) {
	testOutbox(t, versionLike(), func(t *outboxTest) {
		t.append("one")
		t.connect("a", "", "x-0")
		t.buffered("a x-1 one")
		start := time.Now()
		for len(t.gateway.sends()) > 0 {
			t.buffered("a ?")
			time.Sleep(openPause)
			t.rest()
		}
		if got := time.Since(start); got != openLimit {
			t.Errorf("asked for %s, want %s", got, openLimit)
		}
		t.append("two")
		t.delivers("a x-2 two") // then it has opened, and the browser has both
		t.connect("b", "", "x-2")
	})
}

// A task's events are all sent again anyway.
func TestOutboxOfTaskDoesNotAskWhetherTheStreamOpened(t *testing.T) {
	testOutbox(t, taskLike(), func(t *outboxTest) {
		t.append("one")
		t.connect("a", "", "x-0")
		t.buffered("a x-1 one")
		t.wantUnderWay()
	})
}

// The races: every step of each story is one that network and goroutines may choose.

func TestRaceConnectDuringSend(t *testing.T) {
	for name, answer := range map[string]func(t *outboxTest, send string){
		"ok":       func(t *outboxTest, send string) { t.ok(send) },
		"buffered": func(t *outboxTest, send string) { t.buffered(send) },
		"fails":    func(t *outboxTest, send string) { t.fails(send) },
	} {
		t.Run(name, func(t *testing.T) {
			testOutbox(t, versionLike(), func(t *outboxTest) {
				t.append("one", "two")
				t.connect("a", "", "x-0")
				t.connect("b", "", "x-0")
				t.wantUnderWay("a x-1 one", closing("a", "replaced"), "b x-1 one")
				answer(t, "a x-1 one") // neither moves nor marks b, and a gets no more
				t.delivers(closing("a", "replaced"), "b x-1 one", "b x-2 two")
			})
		})
	}
}

func TestRaceDisconnectOfOldTokenAfterReconnect(t *testing.T) {
	testOutbox(t, taskLike(), func(t *outboxTest) {
		t.connect("a", "", "x-0")
		t.append("one")
		t.ok("a x-1 one")
		t.connect("b", "x-1", "x-1")
		t.notFound(closing("a", "replaced"))
		t.onDisconnect("a")
		t.wantConnections("task:1 b")
		t.append("two")
		t.delivers("b x-2 two")
	})
}

func TestRace404ForOldTokenAfterReconnect(t *testing.T) {
	testOutbox(t, taskLike(), func(t *outboxTest) {
		t.connect("a", "", "x-0")
		t.append("one")
		t.connect("b", "x-0", "x-0")
		t.notFound("a x-1 one")
		t.notFound(closing("a", "replaced"))
		t.wantConnections("task:1 b")
		t.append("two")
		t.delivers("b x-1 one", "b x-2 two")
	})
}

func TestRaceReplacementDuringReplay(t *testing.T) {
	testOutbox(t, taskLike(), func(t *outboxTest) {
		t.append("one", "two", "three")
		t.connect("a", "", "x-0")
		t.ok("a x-1 one")
		t.connect("b", "", "x-0")
		t.ok("b x-1 one")
		t.ok("a x-2 two")
		t.delivers(closing("a", "replaced"), "b x-2 two", "b x-3 three")
	})
}

// Whoever comes second is the connection, in both maps and for the outbox.
func TestRaceTwoConnectsAtOnce(t *testing.T) {
	testOutbox(t, taskLike(), func(t *outboxTest) {
		t.append("one", "two")
		for range 100 {
			var both sync.WaitGroup
			for _, token := range []string{"a", "b"} {
				both.Go(func() { t.outbox.Connect(connectRequest{token: token, url: "/stream", lastEventID: ""}) })
			}
			both.Wait()
			t.rest()
			first, second := "a", "b"
			if t.conns.tokens["a"] != "" {
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
}

// Appending never waits for the network, and what is appended during a flush comes at its end.
func TestRaceAppendDuringFlush(t *testing.T) {
	testOutbox(t, versionLike(), func(t *outboxTest) {
		t.append("one", "two")
		t.connect("a", "", "x-0")
		t.wantUnderWay("a x-1 one")
		t.append("three")
		t.wantUnderWay("a x-1 one")
		t.ok("a x-1 one")
		t.ok("a x-2 two")
		t.append("four")
		t.wantUnderWay("a x-3 three")
		t.delivers("a x-3 three", "a x-4 four")
	})
}

// The gateway took the event and its answer came too late, or it did not take it: nobody but the browser knows. It is
// sent away, and comes back with the last ID that it has.
func TestRaceTimeoutOfSend(t *testing.T) {
	timeout := func(name string, policy outboxPolicy, lastEventID string, want ...string) {
		t.Run(name+" of "+policy.event, func(t *testing.T) {
			testOutbox(t, policy, func(t *outboxTest) {
				t.append("one", "two")
				t.connect("a", "", "x-0")
				t.fails("a x-1 one")
				t.wantUnderWay("a end") // and no second try
				t.ok("a end")
				t.wantUnderWay()
				t.connect("b", lastEventID, lastEventID)
				t.notFound(closing("a", "replaced"))
				t.delivers(want...)
			})
		})
	}
	for _, policy := range []outboxPolicy{taskLike(), versionLike()} {
		timeout("performed", policy, "x-1", "b x-2 two")
		timeout("not performed", policy, "x-0", "b x-1 one", "b x-2 two")
	}
}

// Without a later event nobody sees a gap, so the stream stays until there is something to send, or until the sweep.
func TestRaceTimeoutOfTheNewestEvent(t *testing.T) {
	for name, next := range map[string]func(t *outboxTest){
		"event": func(t *outboxTest) { t.append("two") },
		"end":   func(t *outboxTest) { t.end("task_completed") },
		"sweep": func(t *outboxTest) { go t.conns.sweep(0); t.rest() },
	} {
		t.Run(name, func(t *testing.T) {
			testOutbox(t, taskLike(), func(t *outboxTest) {
				t.append("one")
				t.connect("a", "", "x-0")
				t.fails("a x-1 one")
				t.wantUnderWay()
				next(t)
				t.delivers("a end")
			})
		})
	}
}

func TestOutboxKeepsOneOrderForManyProducers(t *testing.T) {
	t.Parallel()
	const producers, each = 8, 200
	var got []string // by one sender at a time
	conns := newConnectionManager(senderFunc(func(events []event) sendResult {
		for _, e := range events {
			got = append(got, e.ID)
		}
		return sendResult{taken: len(events)}
	}), slog.New(slog.DiscardHandler), noConnectionMetrics{})
	policy := taskLike()
	o := newOutbox("task:1", conns, &policy)
	o.Connect(connectRequest{token: "a", url: "/", lastEventID: ""})
	var wg sync.WaitGroup
	for range producers {
		wg.Go(func() {
			for range each {
				o.Append("data", false)
			}
		})
	}
	wg.Wait()
	conns.Drain(t.Context())
	for i, id := range got {
		if want := fmt.Sprint("x-", i+1); id != want {
			t.Fatalf("got %s, want %s", id, want)
		}
	}
	if len(got) != producers*each {
		t.Errorf("got %d events, want %d", len(got), producers*each)
	}
}

// The model: an outbox, and around it a network, a gateway and browsers that do at random whatever they may do. A
// browser that sees an event twice, not in order, or after a gap fails the test at once.

// world is a gateway, its streams and the browsers that follow one identifier.
type world struct {
	*outboxTest
	rand        *rand.Rand
	browsers    []*simBrowser
	streams     []*simStream
	performed   map[*stepped]sendResult // sends that were done but not answered
	late        []*stepped              // sends that failed, but that the gateway may yet do
	disconnects []string                // tokens of disconnect callbacks on the way
	written     map[uint64]bool         // numbers of events that an open stream has taken
}

// simBrowser is a page with an EventSource.
type simBrowser struct {
	t        *testing.T
	stream   *simStream // nil after its end, until the browser reconnects
	lastID   string     // last event ID
	position uint64     // number of the last event that it has
	reason   string     // data of connection_close, after which it does not come back
}

func (b *simBrowser) follows() bool { return b.stream != nil }
func (b *simBrowser) away() bool    { return b.stream == nil && b.reason == "" }

// receive takes an event as it comes out of the stream.
func (b *simBrowser) receive(e event) {
	b.t.Helper()
	n, _ := strconv.ParseUint(strings.TrimPrefix(e.ID, "x-"), 10, 64)
	switch {
	case e.ID == closeID:
		b.reason = e.Data
	case e.Name == "connection_open" && b.lastID == "":
		b.position = n
	case e.Name == "connection_open" && n != b.position:
		b.t.Errorf("a browser that has %d goes on after %d", b.position, n)
	case e.Name == "connection_open":
	case n != b.position+1:
		b.t.Errorf("a browser that has %d gets %d", b.position, n)
	default:
		b.position = n
	}
	b.lastID = e.ID
}

// simStream is a stream as the gateway knows it.
type simStream struct {
	token   string
	browser *simBrowser // may have left without the gateway's knowledge
	first   event       // the backend's answer to the connect callback
	open    bool        // the answer has arrived
	buffer  []event     // for when it opens
	ending  bool        // when the buffer is written
	ended   bool
}

func (s *simStream) opening() bool { return !s.open && !s.ended }
func (s *simStream) left() bool    { return !s.ended && s.browser.stream != s }

func newWorld(t *testing.T, policy outboxPolicy, seed uint64) *world {
	w := &world{
		outboxTest: newOutboxTest(newConnTest(t), policy),
		rand:       rand.New(rand.NewPCG(seed, 0)),
		browsers:   []*simBrowser{{t: t}},
		performed:  map[*stepped]sendResult{},
		written:    map[uint64]bool{},
	}
	w.gateway.batches = seed%2 == 1
	return w
}

// connect makes b a new stream, which the backend accepts.
func (w *world) connect(b *simBrowser) {
	w.Helper()
	s := &simStream{token: fmt.Sprint("t", len(w.streams)), browser: b}
	w.streams = append(w.streams, s)
	b.stream = s
	s.first, _ = w.outbox.Connect(connectRequest{token: s.token, url: "/stream", lastEventID: b.lastID})
	w.rest()
	after, _ := w.outbox.parseID(s.first.ID)
	for n := range after {
		if !w.written[n+1] {
			w.Errorf("%s begins after %d, but nobody got %d", s.token, after, n+1)
		}
	}
}

// write puts an event on an open stream.
func (w *world) write(s *simStream, e event) {
	w.Helper()
	if n, ok := w.outbox.parseID(e.ID); ok && e != s.first {
		w.written[n] = true
	}
	if s.browser.stream == s {
		s.browser.receive(e)
	}
}

// opens is the moment when the answer to the connect callback arrives at the gateway.
func (w *world) opens(s *simStream) {
	w.Helper()
	s.open = true
	for _, e := range append([]event{s.first}, s.buffer...) {
		w.write(s, e)
	}
	if s.ending {
		w.ends(s)
	}
}

// ends ends a stream. The gateway tells the backend some time later.
func (w *world) ends(s *simStream) {
	s.ended = true
	if s.browser.stream == s {
		s.browser.stream = nil
	}
	w.disconnects = append(w.disconnects, s.token)
}

// perform is what the gateway does with a send.
func (w *world) perform(p *stepped) (r sendResult) {
	w.Helper()
	s := w.streams[slices.IndexFunc(w.streams, func(s *simStream) bool { return s.token == p.token })]
	for i, e := range p.events {
		switch n := w.rand.IntN(20); { // before the next of a batch
		case i > 0 && n == 0 && !s.ended:
			w.ends(s)
		case i > 0 && n < 3 && s.opening():
			w.opens(s)
		}
		switch {
		case s.ended || s.ending:
			r.err = errUnknownToken
			return r
		case s.open:
			w.write(s, e)
		default:
			s.buffer = append(s.buffer, e)
		}
		r.taken, r.buffered = i+1, !s.open
	}
	switch {
	case s.ended || s.ending:
		r.err = errUnknownToken
	case s.open && p.end:
		w.ends(s)
	case p.end:
		s.ending = true
	}
	r.buffered = r.err == nil && !s.open
	return r
}

// reply ends a send: with what the gateway did, or with an error.
func (w *world) reply(p *stepped, r sendResult) {
	w.Helper()
	delete(w.performed, p)
	w.gateway.reply(p, r)
	w.rest()
}

// step is one thing that happens.
func (w *world) step() {
	w.Helper()
	switch n := w.rand.IntN(100); {
	case n < 5:
		w.append("data")
	case n < 6: // the page is loaded again, or in another tab
		b := &simBrowser{t: w.T}
		w.browsers = append(w.browsers, b)
		w.connect(b)
	case n < 16:
		if b := pickOne(w.rand, w.browsers, (*simBrowser).away); b != nil {
			w.connect(b)
		}
	case n < 26:
		if s := pickOne(w.rand, w.streams, (*simStream).opening); s != nil {
			w.opens(s)
		}
	case n < 29: // a browser loses its stream
		if b := pickOne(w.rand, w.browsers, (*simBrowser).follows); b != nil {
			b.stream = nil
		}
	case n < 34: // and the gateway notices, perhaps much later
		if s := pickOne(w.rand, w.streams, (*simStream).left); s != nil {
			w.ends(s)
		}
	case n < 39: // a disconnect callback arrives, late or never
		if len(w.disconnects) > 0 {
			i := w.rand.IntN(len(w.disconnects))
			if w.rand.IntN(4) > 0 {
				w.onDisconnect(w.disconnects[i])
			}
			w.disconnects = slices.Delete(w.disconnects, i, i+1)
		}
	case n < 44:
		time.Sleep(openPause)
		w.rest()
	case n < 46:
		go w.conns.sweep(0)
		w.rest()
	case n < 50: // the gateway does something that nobody waits for any more
		if len(w.late) > 0 {
			w.perform(w.late[0])
			w.late = w.late[1:]
		}
	default:
		w.network()
	}
}

// network takes a send that is under way one step further.
func (w *world) network() {
	w.Helper()
	p := pickOne(w.rand, w.gateway.all(), func(*stepped) bool { return true })
	if p == nil {
		return
	}
	answer, done := w.performed[p]
	switch fails := w.rand.IntN(10) == 0; {
	case fails && done:
		w.reply(p, sendResult{err: errNoAnswer})
	case fails:
		w.late = append(w.late, p)
		w.reply(p, sendResult{err: errNoAnswer})
	case done:
		w.reply(p, answer)
	default:
		w.performed[p] = w.perform(p)
	}
}

// calm lets everything go well until no browser is away.
func (w *world) calm() {
	w.Helper()
	for range 100 {
		go w.conns.sweep(0)
		w.rest()
		for all := w.gateway.all(); len(all) > 0; all = w.gateway.all() {
			answer, done := w.performed[all[0]]
			if !done {
				answer = w.perform(all[0])
			}
			w.reply(all[0], answer)
		}
		for _, s := range w.streams {
			if s.left() {
				w.ends(s)
			} else if s.opening() {
				w.opens(s)
			}
		}
		for _, token := range w.disconnects {
			w.onDisconnect(token)
		}
		w.disconnects = nil
		b := pickOne(w.rand, w.browsers, (*simBrowser).away)
		if b != nil {
			w.connect(b)
		}
		time.Sleep(openPause)
		w.rest()
		if b == nil && len(w.gateway.all()) == 0 {
			return
		}
	}
	w.Fatal("does not come to rest")
}

// pickOne returns one of those that are good, or nil.
func pickOne[T any](r *rand.Rand, all []*T, good func(*T) bool) *T {
	all = slices.DeleteFunc(slices.Clone(all), func(x *T) bool { return !good(x) })
	if len(all) == 0 {
		return nil
	}
	return all[r.IntN(len(all))]
}

// check looks for what each browser lacks, except those that another one has replaced.
func (w *world) check() {
	w.Helper()
	complete := 0
	for _, b := range w.browsers {
		current := b.follows() && w.conns.tokens[b.stream.token] != ""
		if !current && !strings.Contains(b.reason, "task_completed") {
			continue
		}
		if current && w.outbox.reason != "" {
			w.Error("a browser still waits for the end")
		}
		if b.position != w.outbox.last {
			w.Errorf("a browser has %d of %d events", b.position, w.outbox.last)
		}
		complete++
	}
	if complete == 0 {
		w.Error("nobody came to the end")
	}
}

func TestOutboxModel(t *testing.T) {
	t.Parallel()
	const worlds, steps = 100, 400
	for seed := range uint64(worlds) {
		for _, policy := range []outboxPolicy{taskLike(), versionLike()} {
			t.Run(fmt.Sprint(policy.event, " ", seed), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					w := newWorld(t, policy, seed)
					for i := range steps {
						w.step()
						if i == steps*3/4 && policy.replay {
							w.end("task_completed")
						}
					}
					w.calm()
					w.check()
				})
			})
		}
	}
}

func BenchmarkOutboxAppendWithoutConnection(b *testing.B) {
	conns := newConnectionManager(nil, slog.New(slog.DiscardHandler), noConnectionMetrics{})
	for _, policy := range []outboxPolicy{taskLike(), versionLike()} {
		for _, policy.limit = range []int{100, 1000} {
			b.Run(fmt.Sprint(policy.event, "/limit=", policy.limit), func(b *testing.B) {
				policy.dropped = func(int) {}
				o := newOutbox("task:1", conns, &policy)
				o.Append("first", true)
				b.ReportAllocs()
				for b.Loop() {
					o.Append("data", false)
				}
			})
		}
	}
}

// What an identifier costs that waits for its first event, with its strings and its places in the maps.
func BenchmarkMemoryOfIdleIdentifiers(b *testing.B) {
	const identifiers = 100_000
	measure := func(name string, connect bool) {
		b.Run(name, func(b *testing.B) {
			policy := versionLike()
			for b.Loop() {
				before := heapInUse()
				conns := newConnectionManager(nil, slog.New(slog.DiscardHandler), noConnectionMetrics{})
				all := make([]*outbox, identifiers)
				for i := range all {
					id := newToken()
					all[i] = newOutbox("version:"+id, conns, &policy)
					if connect {
						all[i].Connect(connectRequest{token: newToken(), url: "/api/sse/utils/version?request_id=" + id, lastEventID: ""})
					}
				}
				b.ReportMetric(float64(heapInUse()-before)/identifiers, "B/identifier")
				runtime.KeepAlive(conns)
				runtime.KeepAlive(all)
			}
		})
	}
	measure("waiting", false)
	measure("connected", true)
}

// heapInUse returns the bytes of what is still needed.
func heapInUse() uint64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.GC() // of what the first one left in pools
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}
