package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// A job is an external task that gets reports all the time, and all clients that have ever followed it.
type job struct {
	*task
	texts   []string // of its reports so far
	clients []*eventSource
}

// event returns event n of the job as story tells it, or "nothing" if there is none. The job must have all its reports.
func (j *job) event(n int) string {
	switch reports := len(j.texts); {
	case n < 1:
		return "nothing"
	case n == 1:
		return "task_started"
	case n < reports+2:
		return "progress_update " + j.texts[n-2]
	case n == reports+2:
		return "task_completed"
	}
	return "nothing"
}

// check reports whether the task's events are the first n of the job, each once and in order. Without IDs a stream that
// was interrupted begins again; that is all it may do.
func (j *job) check(events []message) (n int, err error) {
	for _, m := range events {
		if m.Name != "task_event" {
			continue
		}
		switch got := story([]message{m})[0]; {
		case got == j.event(n+1):
			n++
		case m.ID == "" && got == j.event(1):
			n = 1
		default:
			return n, fmt.Errorf("got %q with ID %q after %q", got, m.ID, j.event(n))
		}
		if want := j.events.id(uint64(n)); m.ID != "" && m.ID != want {
			return n, fmt.Errorf("got ID %q, want %q", m.ID, want)
		}
	}
	return n, nil
}

// current returns the clients of the job that have not given up.
func (j *job) current() []*eventSource {
	return slices.DeleteFunc(slices.Clone(j.clients), func(es *eventSource) bool { return es.state() == "closed" })
}

// A chaos is a system in which everything happens at the same time.
type chaos struct {
	*system
	jobs  []*job
	limit time.Duration // for the rest to arrive: the longer the chaos, the more events a task has
}

// start starts n jobs, each with a report at every interval until stop is called. It calls begin for each before its
// first report.
func (c *chaos) start(n int, interval time.Duration, begin func(j *job)) (stop func()) {
	ctx, cancel := context.WithCancel(c.t.Context())
	var reporters sync.WaitGroup
	for range n {
		task, _, err := c.tasks.Start(externalTask, object{})
		must(c.t, err)
		j := &job{task: task}
		begin(j)
		c.jobs = append(c.jobs, j)
		reporters.Go(func() {
			for tick := time.Tick(interval); ctx.Err() == nil; <-tick {
				text := fmt.Sprintf("report %d on %s", len(j.texts), j.id)
				j.texts = append(j.texts, text)
				c.tasks.Progress(j.id, report{text: &text})
			}
		})
	}
	stop = func() {
		cancel()
		reporters.Wait()
	}
	c.t.Cleanup(stop)
	return stop
}

// rivals makes one more client follow each of n tasks, chosen at random.
func (c *chaos) rivals(n int) {
	for range n {
		j := c.jobs[rand.IntN(len(c.jobs))]
		j.clients = append(j.clients, c.follow(j.id))
	}
}

// disturb cuts the streams of clients at random, and now and then adds a rival.
func (c *chaos) disturb(d time.Duration) {
	for tick, end := time.Tick(25*time.Millisecond), time.Now().Add(d); time.Now().Before(end); <-tick {
		if rand.IntN(8) == 0 {
			c.rivals(1)
		}
		j := c.jobs[rand.IntN(len(c.jobs))]
		if es := j.clients[rand.IntN(len(j.clients))]; es.state() == "open" {
			es.cut()
		}
	}
}

// Whatever happens between the backend and a browser, the browser ends up with every event once and in order, and no
// two of them fight for one task. Any of them may win: one that was cut when it was replaced does not know that, so it
// comes back and replaces its successor. So each client gets the first events of its task, and then, for good, either
// the rest or connection_close "replaced"; and exactly one client of each task gets the rest.
//
// SIDECAST_CHAOS_ROUNDS sets the number of rounds, each of 1.5 s and a crash of the gateway.
func TestChaos(t *testing.T) {
	t.Parallel()
	rounds := 3
	if n, err := strconv.Atoi(os.Getenv("SIDECAST_CHAOS_ROUNDS")); err == nil {
		rounds = n
	}
	c := &chaos{
		system: newSystem(t, startGateway, "TASK_EVENT_LIMIT=1000000000"),
		limit:  time.Duration(rounds) * soon,
	}
	stop := c.start(20, 10*time.Millisecond, func(j *job) { j.clients = []*eventSource{c.follow(j.id)} })
	first := c.jobs[0].clients[0]
	wantStory(t, first, "task_started")
	ids := first.events()[0].ID != ""
	for range rounds {
		c.disturb(1500 * time.Millisecond)
		c.rivals(5) // their connect callbacks are under way when the gateway dies
		c.gateway.restart(t)
	}
	c.disturb(1500 * time.Millisecond)
	stop()

	for _, j := range c.jobs {
		if !ids { // nothing else keeps rivals away
			for _, es := range j.clients[1:] {
				es.close()
			}
		}
		eventually(t, soon, "one client of each task is left, and connected", func() bool {
			current := j.current()
			return len(current) == 1 && current[0].state() == "open"
		})
	}
	c.wantConnections("task", len(c.jobs))
	if err := checkConsistency(c.conns); err != nil {
		t.Error(err)
	}
	if ids {
		c.wantStreams(len(c.jobs))
	}
	for _, j := range c.jobs {
		c.finish(j, ids)
	}
	if ids {
		c.wantConnections("task", 0)
		c.wantStreams(0)
	}
}

// finish completes the task and checks what each client got in the end.
func (c *chaos) finish(j *job, ids bool) {
	winner := j.current()[0]
	c.complete(j.id)
	winner.waitFor(c.t, c.limit, completed)
	for _, es := range j.clients {
		if ids && es.waitClosed(c.t, soon) != http.StatusGone {
			c.t.Errorf("%s: a client gave up at status %d, want 410", j.id, es.failure())
		}
		n, err := j.check(es.events())
		if err != nil {
			c.t.Errorf("%s: %v", j.id, err)
			continue
		}
		if !ids {
			continue // it may have been replaced, and have begun again, any number of times
		}
		want := []string{"connection_close replaced"}
		if es == winner {
			want = []string{"task_completed", "connection_close task_completed"}
			n--
		}
		if got := story(es.events())[n:]; !slices.Equal(got, want) {
			c.t.Errorf("%s: after %d events a client got %q, want %q", j.id, n, got, want)
		}
	}
}

// A pageReader is a page that follows a changing set of jobs with a page stream.
type pageReader struct {
	path  string
	parts []*pagePart // the last one goes on
}

// A pagePart is what a page has from one EventSource.
type pagePart struct {
	*eventSource
	jobs   []*job
	after  string    // its lastEventId
	events []message // once it is over
}

// turn makes the page follow 3 to 8 jobs, after the last event that it has. It opens the new stream before it closes
// the old one, and takes no more events from that.
func (c *chaos) turn(r *pageReader) {
	next := &pagePart{}
	target := c.streams + r.path
	for _, i := range rand.Perm(len(c.jobs))[:3+rand.IntN(6)] {
		next.jobs = append(next.jobs, c.jobs[i])
		target += "&task_id=" + c.jobs[i].id
	}
	if len(r.parts) > 0 {
		last := r.parts[len(r.parts)-1]
		next.after, last.events = last.after, last.eventSource.events()
		if n := len(last.events); n > 0 && last.events[n-1].ID != "" {
			next.after = last.events[n-1].ID
		}
		target += "&lastEventId=" + next.after
		defer last.close()
	}
	next.eventSource = openEventSource(c.t, target)
	r.parts = append(r.parts, next)
}

// check checks that the events are those that follow the last event ID of the part, each once and in the order of its
// job, and returns how many of each job the page has in the end. All jobs must have all their reports.
func (p *pagePart) check() (n map[*job]int, err error) {
	n = map[*job]int{}
	for _, j := range p.jobs {
		n[j] = int(parsePositions(p.after)[j.events.epoch])
	}
	for _, m := range p.events {
		if m.Name == "task_event" {
			i := slices.IndexFunc(p.jobs, func(j *job) bool { return strings.Contains(m.Data, strconv.Quote(j.id)) })
			if i < 0 {
				return n, fmt.Errorf("got an event of a task that is not followed: %s", m.Data)
			}
			j := p.jobs[i]
			if got, want := story([]message{m})[0], j.event(n[j]+1); got != want {
				return n, fmt.Errorf("got %q with ID %q, want %q", got, m.ID, want)
			}
			n[j]++
		} else if m.Name != "connection_open" {
			return n, fmt.Errorf("got %v", m)
		}
		for _, j := range p.jobs { // the ID says where the page is in each
			if want := j.events.id(uint64(n[j])); !slices.Contains(strings.Split(m.ID, "."), want) {
				return n, fmt.Errorf("got ID %q, want %q in it", m.ID, want)
			}
		}
	}
	return n, nil
}

// Pages that follow overlapping sets of tasks, and change them, get each event of each task once and in order after
// their last event ID, although the tasks have streams of their own and the gateway crashes.
func TestChaosPages(t *testing.T) {
	t.Parallel()
	c := &chaos{system: newSystem(t, startOwnGateway, "TASK_EVENT_LIMIT=1000000000")}
	stop := c.start(30, 20*time.Millisecond, func(*job) {})
	for _, j := range c.jobs[:10] {
		j.clients = []*eventSource{c.follow(j.id)}
	}
	readers := make([]*pageReader, 10)
	for i := range readers {
		readers[i] = &pageReader{path: fmt.Sprint("/api/sse/stream?request_id=", i)}
		c.turn(readers[i])
	}
	churn := func(d time.Duration) {
		for tick, end := time.Tick(25*time.Millisecond), time.Now().Add(d); time.Now().Before(end); <-tick {
			r := readers[rand.IntN(len(readers))]
			switch es := r.parts[len(r.parts)-1].eventSource; {
			case es.state() != "open": // otherwise its request might come after that of its successor
			case rand.IntN(3) == 0:
				es.cut()
			default:
				c.turn(r)
			}
		}
	}
	for range 3 {
		churn(time.Second)
		c.gateway.kill(t)
		for _, r := range readers[:5] {
			r.parts[len(r.parts)-1].close() // so that its request does not come after that of its successor
			c.turn(r)
		}
		c.gateway.restart(t)
	}
	churn(time.Second)
	stop()
	for _, j := range c.jobs {
		c.complete(j.id)
	}

	turns := 0
	for _, r := range readers {
		last := r.parts[len(r.parts)-1]
		last.events = last.waitFor(t, soon, func(events []message) bool {
			return !slices.ContainsFunc(last.jobs, func(j *job) bool { return !completed(ofTask(events, j.id)) })
		})
		for _, p := range r.parts {
			n, err := p.check()
			if err != nil {
				t.Fatalf("%s after %q: %v", r.path, p.after, err)
			}
			for _, j := range p.jobs {
				if p == last && j.event(n[j]) != "task_completed" {
					t.Errorf("%s: got %d events of a task, want %d", r.path, n[j], len(j.texts)+2)
				}
			}
		}
		turns += len(r.parts)
	}
	for _, j := range c.jobs[:10] {
		if _, err := j.check(j.clients[0].waitFor(t, soon, completed)); err != nil {
			t.Error(err)
		}
	}
	if turns < 20 {
		t.Errorf("the pages opened %d streams, want 20 or more", turns)
	}
	c.wantConnections("page", len(readers))
	c.wantConnections("task", 0)
}

// TestChaos must fail with a gateway that loses the first event.
func TestChaosCheck(t *testing.T) {
	t.Parallel()
	j := &job{texts: []string{"half"}}
	report := message{Name: "task_event", Data: `{"event_type":"progress_update","data":{"text":"half"}}`}
	want := `got "progress_update half" with ID "" after "nothing"`
	if n, err := j.check([]message{report}); n != 0 || err == nil || err.Error() != want {
		t.Errorf("got %d events and error %v, want none and %s", n, err, want)
	}
}

func completed(events []message) bool {
	return slices.ContainsFunc(events, func(m message) bool {
		return strings.Contains(m.Data, `"event_type":"task_completed"`)
	})
}
