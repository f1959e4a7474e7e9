package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net/http"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// subscribe opens a stream for a request_id.
func (api *apiFixture) subscribe(id string) *apiStream {
	api.t.Helper()
	return api.connect("/api/sse/utils/version?request_id=" + id)
}

// checkAnnounce posts an announcement and checks the answer.
func (api *apiFixture) checkAnnounce(body, want string) {
	api.t.Helper()
	api.check("POST", "/api/deployments/version", body, want)
}

// checkAnnounced announces a version to one request_id and checks whether it was delivered.
func (api *apiFixture) checkAnnounced(id, version string, delivered bool) {
	api.t.Helper()
	status := map[bool]string{true: "delivered", false: "queued"}[delivered]
	api.checkAnnounce(fmt.Sprintf(`{"request_id":%q,"version":%q}`, id, version),
		fmt.Sprintf(`202 {"delivered":%v,"requestId":%q,"status":%q}`, delivered, id, status))
}

// checkAnnouncedToAll announces a version to everybody and checks how many got it and how many did not.
func (api *apiFixture) checkAnnouncedToAll(version string, delivered, failed int) {
	api.t.Helper()
	api.checkAnnounce(fmt.Sprintf(`{"version":%q}`, version),
		fmt.Sprintf(`202 {"delivered":%d,"failed":%d,"version":%q}`, delivered, failed, version))
}

// wantLogs checks which request IDs have a log.
func (api *apiFixture) wantLogs(want string) {
	api.t.Helper()
	if got := strings.Join(slices.Sorted(maps.Keys(api.version.streams)), " "); got != want {
		api.t.Errorf("got logs of %q, want of %q", got, want)
	}
}

func TestVersionOutbox(t *testing.T) {
	apiStory(t, "events", "", func(t *testing.T, api *apiFixture) {
		stream := api.subscribe("r")
		const answer = `202 {"delivered":true,"requestId":"r","status":"delivered"}`
		api.checkAnnounce(`{"request_id":"r","version":"1.0","changelog":"<b>new</b>\nand \"better\""}`, answer)
		api.checkAnnounce(`{"request_id":"r","version":"1.1","changelog":""}`, answer)
		api.checkAnnounce(`{"request_id":"r","version":"1.2"}`, answer)
		stream.wantText(`e-0 connection_open {"status":"connected"}
e-1 version {"version":"1.0","changelog":"<b>new</b>\nand \"better\""}
e-2 version {"version":"1.1"}
e-3 version {"version":"1.2"}
`)
	})

	// The browser may or may not have the event, so the next event ends its stream, and it comes back for the rest.
	apiStory(t, "kept when a send fails", "", func(t *testing.T, api *apiFixture) {
		stream := api.subscribe("r")
		api.gateway.fail(errors.New("no gateway"))
		api.checkAnnounced("r", "1", false)
		api.gateway.fail(nil)
		api.checkAnnounced("r", "2", false)
		stream.checkStory("connection_open")
		stream.leave()
		api.connect("/api/sse/utils/version?request_id=r", "e-0").checkStory("connection_open version:1 version:2")
	})
	apiStory(t, "expires", "VERSION_PENDING_SECONDS=1000", func(t *testing.T, api *apiFixture) {
		go api.version.Tidy(t.Context())
		checkEvents := func(want, wantExpired float64) {
			t.Helper()
			api.settle()
			api.wantMetric(`sse_outbox_events{service="version"}`, want)
			api.wantMetric(`sse_outbox_dropped_total{service="version",reason="expired"}`, wantExpired)
		}
		api.subscribe("connected")
		api.checkAnnounced("connected", "1", true)
		api.checkAnnounced("never", "1", false)
		api.checkAnnounced("never", "2", false)
		left := api.subscribe("left")
		time.Sleep(500 * time.Second)
		left.leave()
		api.checkAnnounced("left", "1", false)
		time.Sleep(500*time.Second - time.Nanosecond)
		checkEvents(4, 0)
		time.Sleep(tidyInterval)
		checkEvents(2, 2)                          // never's are gone
		time.Sleep(500*time.Second + tidyInterval) // its time counts from the first tidy that misses it
		checkEvents(1, 3)                          // left's too
		api.subscribe("never").checkStory("connection_open")
	})

	// A laptop that slept until its log had expired comes back with the ID of an event of the old log.
	apiStory(t, "nothing is skipped after it expired", "VERSION_PENDING_SECONDS=1000", func(t *testing.T, api *apiFixture) {
		api.version.policy.epoch = newEpoch
		go api.version.Tidy(t.Context())
		stream := api.subscribe("r")
		api.checkAnnouncedToAll("1", 1, 0)
		stream.leave()
		time.Sleep(2000 * time.Second)
		api.checkAnnouncedToAll("2", 0, 0)
		api.connect("/api/sse/utils/version?request_id=r", stream.lastID()).checkStory("connection_open version:2")
	})
}

func TestVersionPendingLimit(t *testing.T) {
	for settings, want := range map[string]int{"": 100, "VERSION_PENDING_LIMIT=3": 3, "VERSION_PENDING_LIMIT=0": 150} {
		t.Run(settings, func(t *testing.T) {
			apiTest(t, settings, func(t *testing.T, api *apiFixture) {
				story := "connection_open"
				for version := range 150 {
					api.checkAnnounced("r", fmt.Sprint(version), false)
					if version >= 150-want {
						story += fmt.Sprint(" version:", version)
					}
				}
				api.wantMetric(`sse_outbox_dropped_total{service="version",reason="limit"}`, float64(150-want))
				api.subscribe("r").checkStory(story)
			})
		})
	}
}

func TestVersionBroadcast(t *testing.T) {
	apiStory(t, "to all", "", func(t *testing.T, api *apiFixture) {
		api.checkAnnouncedToAll("1", 0, 0)
		api.checkAnnounced("b", "own", false)
		a, b := api.subscribe("a"), api.subscribe("b")
		a.checkStory("connection_open version:1")
		b.checkStory("connection_open version:1 version:own") // in the order of the announcements
		c, lost := api.subscribe("c"), api.subscribe("lost")
		c.checkStory("connection_open version:1")
		time.Sleep(settleTime)
		api.conns.sweep(0) // shows that they were there for settleTime
		c.leave()
		lost.lose()
		api.checkAnnouncedToAll("2", 2, 1)
		a.checkStory("connection_open version:1 version:2")
		b.checkStory("connection_open version:1 version:own version:2")
		api.checkAnnouncedToAll("3", 2, 0)
		api.subscribe("c").checkStory("connection_open version:3") // the latest, not all
		api.subscribe("lost").checkStory("connection_open version:2 version:3")
		api.subscribe("a").checkStory("connection_open") // it has everything
	})

	// If an older version came after a newer one, the page would offer the older one.
	apiStory(t, "in the order of the announcements", "", func(t *testing.T, api *apiFixture) {
		away := api.subscribe("away")
		away.leave()
		api.checkAnnounced("waits", "0", false)
		api.checkAnnouncedToAll("1", 0, 0)
		for _, id := range []string{"away", "waits", "fresh"} {
			api.checkAnnounced(id, "2", false)
		}
		api.subscribe("away").checkStory("connection_open version:1 version:2")
		api.subscribe("fresh").checkStory("connection_open version:1 version:2")
		waits := api.subscribe("waits")
		waits.checkStory("connection_open version:0 version:1 version:2")
		time.Sleep(settleTime)
		waits.leave()
		api.checkAnnouncedToAll("3", 2, 0)
		api.checkAnnounced("waits", "3", false) // the same as the broadcast: once
		api.subscribe("waits").checkStory("connection_open version:3")
		api.checkAnnouncedToAll("3", 0, 0)
	})

	// A version that the browser already has would make the page offer a reload for nothing.
	apiStory(t, "not twice in a row", "", func(t *testing.T, api *apiFixture) {
		a, b := api.subscribe("a"), api.subscribe("b")
		api.checkAnnounced("a", "1", true)
		api.checkAnnouncedToAll("1", 1, 0) // only b lacks it
		api.checkAnnouncedToAll("1", 0, 0)
		a.checkStory("connection_open version:1")
		b.checkStory("connection_open version:1")
		api.checkAnnounced("c", "1", false)
		api.subscribe("c").checkStory("connection_open version:1")
		api.checkAnnouncedToAll("2", 3, 0)
		api.checkAnnouncedToAll("1", 3, 0) // back to the old one is news again
		a.checkStory("connection_open version:1 version:2 version:1")
		api.checkAnnounced("a", "own", true)
		time.Sleep(settleTime)
		api.subscribe("a").checkStory("connection_open") // and not the one before its last
	})
}

func TestVersionBodies(t *testing.T) {
	t.Parallel()
	api := newAPI(t, "")
	long, longest := strings.Repeat("x", maxVersion+1), strings.Repeat("x", maxChangelog+1)
	const (
		badVersion   = `400 {"error":"version must be a string of 1 to 256 bytes","code":"bad_version"}`
		badChangelog = `400 {"error":"changelog must be a string of at most 32768 bytes","code":"bad_changelog"}`
	)
	badID := `400 {"error":"` + errBadID.Error() + `","code":"bad_id"}`
	for body, want := range map[string]string{
		``:                                 `400 {"error":"body must be one JSON object","code":"not_json"}`,
		`{}`:                               badVersion,
		`{"request_id":"r"}`:               badVersion,
		`{"version":null}`:                 badVersion,
		`{"version":""}`:                   badVersion,
		`{"version":2}`:                    badVersion,
		`{"version":"` + long + `"}`:       badVersion,
		`{"version":"1","changelog":null}`: badChangelog,
		`{"version":"1","changelog":[]}`:   badChangelog,
		`{"version":"1","changelog":"` + longest + `"}`:                                  badChangelog,
		`{"version":"1","request_id":null}`:                                              badID,
		`{"version":"1","request_id":""}`:                                                badID,
		`{"version":"1","request_id":"a:b"}`:                                             badID,
		`{"version":"1","request_id":"a\nb"}`:                                            badID,
		`{"version":"1","request_id":"` + long + `"}`:                                    badID,
		`{"x":"` + strings.Repeat("x", maxVersionBody) + `"}`:                            `413 {"error":"request body too large","code":"too_large"}`,
		`{"version":"1","changelog":"` + strings.Repeat("\u2028", maxChangelog/3) + `"}`: `413 {"error":"version and changelog have more than 64000 bytes in JSON","code":"too_large"}`,
		`{"version":"` + long[1:] + `","changelog":"` + longest[1:] + `"}`:               `202 {"delivered":0,"failed":0,"version":"` + long[1:] + `"}`,
	} {
		api.checkAnnounce(body, want)
	}
	api.wantLogs("")
}

// Announcements for IDs that never connect must not fill the memory: those that do not fit are refused until others are
// gone.
func TestVersionMemoryIsBounded(t *testing.T) {
	apiTest(t, "", func(t *testing.T, api *apiFixture) {
		api.checkAnnounced("a", "1", false)
		one := int(api.version.memory.bytes.Load())
		api.version.memory.limit = 2 * one
		api.checkAnnounced("b", "1", false)
		full := `503 {"error":"too many announcements or request IDs","code":"no_room"}`
		api.checkAnnounce(`{"request_id":"c","version":"1"}`, full)
		api.wantConnect("t", "/api/sse/utils/version?request_id=c", full)
		api.subscribe("a").checkStory("connection_open version:1") // a is known already
		api.wantLogs("a b")
		time.Sleep(settleTime)
		api.conns.sweep(0)
		api.version.tidy() // keeps pending announcements and open streams
		api.wantLogs("a b")
		api.version.memory.limit = 8 * one
		api.checkAnnounced("c", "1", false)
	})
}

func TestVersionMemory(t *testing.T) {
	// Dropped announcements do not count as held.
	apiStory(t, "is what is kept", "VERSION_PENDING_LIMIT=1", func(t *testing.T, api *apiFixture) {
		api.checkAnnounced("a", "1", false)
		api.checkAnnounced("a", "2", false)
		one := int(api.version.memory.bytes.Load())
		for range 100 {
			api.checkAnnounced("a", "2", false)
		}
		if got := int(api.version.memory.bytes.Load()); got != one {
			t.Errorf("got %d bytes held, want %d", got, one)
		}
	})

	// A client that opens streams under many IDs must not fill the memory either.
	apiStory(t, "idle request IDs make room", "", func(t *testing.T, api *apiFixture) {
		api.checkAnnouncedToAll("1", 0, 0)
		api.checkAnnounced("waits", "own", false)
		idle, here, lost := api.subscribe("idle"), api.subscribe("here"), api.subscribe("lost")
		for _, s := range []*apiStream{idle, here, lost} {
			s.checkStory("connection_open version:1")
		}
		idle.leave()
		lost.lose()
		api.checkAnnouncedToAll("2", 1, 1)
		api.version.tidy()
		api.wantLogs("here idle lost waits") // with memory left
		api.version.memory.limit = 2*int(api.version.memory.bytes.Load()) - 1
		api.version.tidy()
		api.wantLogs("here waits")
		here.checkStory("connection_open version:1 version:2")
		api.subscribe("lost").checkStory("connection_open version:2") // as if its log had been kept
		api.subscribe("waits").checkStory("connection_open version:1 version:own version:2")
	})
}

// checkCounted checks that the bytes counted match the growth of the heap, within a tenth.
func checkCounted(t *testing.T, what string, parts, counted int, before uint64) {
	t.Helper()
	held := int(heapInUse() - before)
	t.Logf("%s: %d bytes each, counted as %d", what, held/parts, counted/parts)
	if counted < held*9/10 || counted > held*11/10 {
		t.Errorf("%s: %d bytes each, counted as %d", what, held/parts, counted/parts)
	}
}

// The bound holds only if the bytes counted match those on the heap.
func TestVersionMemoryIsCounted(t *testing.T) {
	if !alone(t) {
		return
	}
	const ids = 1500 // the maps, which grow in steps, are three quarters full then
	for _, tt := range []struct {
		name      string
		broadcast bool
		steps     string // of each ID: c connects, a and l announce to it, l with a long changelog
	}{
		{"announced", false, "a"},
		{"announced ten times", false, "lalalalala"},
		{"connected", false, "c"},
		{"connected and told by a broadcast", true, "c"},
		{"connected and told", false, "ca"},
		{"announced, connected and told", false, "alcl"},
	} {
		synctest.Test(t, func(t *testing.T) { // the timers go with the bubble
			api := newAPI(t, "")
			api.conns.gateway = senderFunc(func(events []event) sendResult { return sendResult{taken: len(events)} })
			api.conns.log = slog.New(slog.DiscardHandler)
			if tt.broadcast {
				api.checkAnnouncedToAll("1.4.2", 0, 0)
			}
			before := heapInUse()
			for range ids {
				id := newToken()
				single := `{"request_id":"` + id + `","version":"1.4.2"`
				for _, step := range tt.steps {
					switch step {
					case 'c':
						api.request("POST", "/api/sse/callback", apiConnect(newToken(), "/api/sse/utils/version?request_id="+id))
					case 'a':
						api.request("POST", "/api/deployments/version", single+`}`)
					case 'l':
						api.request("POST", "/api/deployments/version", single+`,"changelog":"`+strings.Repeat("x", 1000)+`"}`)
					}
				}
			}
			synctest.Wait()
			checkCounted(t, tt.name, ids, int(api.version.memory.bytes.Load()), before)
			runtime.KeepAlive(api)
		})
	}
}

// raceConnect connects a stream many times, while something else happens, and then checks its request_id.
func raceConnect(t *testing.T, meanwhile func(api *apiFixture, i int), check func(st *versionStream, i int)) {
	t.Helper()
	t.Parallel()
	api := newAPI(t, "LOG_LEVEL=error")
	api.conns.gateway = takeAll().gateway
	pages := &PageService{api.tasks, api.version}
	for i := range int(tries("", 100_000)) {
		if t.Failed() {
			return
		}
		api.version.streams = map[string]*versionStream{} // as few as possible, as the moment is short
		api.version.memory = budget{limit: 1000}
		token := newToken()
		var connected sync.WaitGroup
		connected.Go(func() {
			if c := (connectRequest{token: token}); i%2 == 0 {
				api.version.OnConnect("r", c)
			} else {
				pages.OnConnect("r", c)
			}
		})
		for start, pause := time.Now(), rand.N(10*time.Microsecond); time.Since(start) < pause; {
		}
		meanwhile(api, i)
		connected.Wait()
		check(api.version.streams["r"], i)
		api.conns.OnDisconnect(token)
	}
}

// A version that is announced to everybody while a stream connects must reach that stream, too.
func TestRaceConnectDuringBroadcast(t *testing.T) {
	raceConnect(t, func(api *apiFixture, i int) {
		api.version.TellAll(announcement{fmt.Sprint(i), fmt.Sprint(i)})
	}, func(st *versionStream, i int) {
		if st.version != fmt.Sprint(i) {
			t.Errorf("got %q as the last version of an open stream, want %d", st.version, i)
		}
	})
}

// If a log were forgotten while a stream connects, that stream would get no more events.
func TestRaceConnectWhileMemoryIsShort(t *testing.T) {
	raceConnect(t, func(api *apiFixture, i int) {
		api.version.tidy()
	}, func(st *versionStream, i int) {
		if st == nil {
			t.Error("the log of an open stream was forgotten")
		}
	})
}

// serveVersions serves a version.json; the test gives each answer.
func serveVersions(t *testing.T) (url string, polls chan *http.Request, answers chan http.HandlerFunc) {
	polls, answers = make(chan *http.Request), make(chan http.HandlerFunc)
	server := serveTest(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		select {
		case polls <- r:
		case <-r.Context().Done():
			return
		}
		select {
		case answer := <-answers:
			answer(w, r)
		case <-r.Context().Done():
		}
	}))
	return server.URL, polls, answers
}

// versionAnswer answers a poll with a status and a body, and adds validators to a 200.
func versionAnswer(status int, body string) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if status == http.StatusOK {
			w.Header().Set("ETag", `"the same for each"`)
			w.Header().Set("Last-Modified", "Sat, 01 Jan 2000 00:00:00 GMT")
		}
		w.WriteHeader(status)
		fmt.Fprint(w, body)
	}
}

// A gateway that hangs must not delay the next poll.
func TestVersionPollDoesNotWaitForDelivery(t *testing.T) {
	t.Parallel()
	api := newAPI(t, "")
	api.conns.gateway = senderFunc(func([]event) sendResult {
		<-t.Context().Done()
		return sendResult{err: errNoAnswer}
	})
	api.version.OnConnect("r", connectRequest{token: "t"})
	url, polls, answers := serveVersions(t)
	go api.version.Poll(t.Context(), url, time.Millisecond)
	for _, version := range []string{"1", "1", "2", "2"} {
		receive(t, polls)
		answers <- versionAnswer(200, `{"version":"`+version+`"}`)
	}
	receive(t, polls)
	answers <- versionAnswer(500, "")
}

// A version counts only once it was seen twice. After a start, the second poll must not wait for a whole interval.
func TestVersionPollStartsQuickly(t *testing.T) {
	t.Parallel()
	api := newAPI(t, "")
	server := serveTest(t, versionAnswer(200, `{"version":"1"}`))
	go api.version.Poll(t.Context(), server.URL, time.Hour)
	eventually(t, patience, "the version is known", func() bool { return api.version.Latest() == "1" })
}

func TestVersionPoll(t *testing.T) {
	t.Parallel()
	api := newAPI(t, "")
	stream := api.subscribe("r")
	url, polls, answers := serveVersions(t)
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	stopped := make(chan bool)
	go func() {
		api.version.Poll(ctx, url+"/version.json?key=hidden", time.Millisecond)
		close(stopped)
	}()

	const failed, worksAgain = `level=ERROR msg="polling the frontend version"`, `level=INFO msg="polling the frontend version works again"`
	noHTTP := func(w http.ResponseWriter, r *http.Request) {
		conn, _, _ := w.(http.Hijacker).Hijack()
		fmt.Fprint(conn, "hello\r\n")
		conn.Close()
	}
	said := func(body string) http.HandlerFunc { return versionAnswer(200, body) }
	<-polls
	story := "connection_open"
	for _, tt := range []struct {
		name              string
		answer            http.HandlerFunc
		told              string // to the stream, after that
		errors, recovered int    // log lines so far, after that
	}{
		{"first", said(`{"version":"1","changelog":"x"}`), "", 0, 0},
		{"seen twice", said(` {"version":"1"}`), "1", 0, 0},
		{"still the same", said(`{"version":"1"}`), "", 0, 0},
		{"no HTTP", noHTTP, "", 1, 0},
		{"error", versionAnswer(500, `{"version":"500"}`), "", 1, 0},
		{"missing", versionAnswer(404, `{"version":"404"}`), "", 1, 0},
		{"not modified, though nobody asked", versionAnswer(304, ""), "", 1, 0},
		{"works again", said(`{"version":"1"}`), "", 1, 1},
		{"a page", said(`<!DOCTYPE html>`), "", 2, 1},
		{"too large", said(`{"version":"3"}` + strings.Repeat(" ", maxVersionBody)), "", 2, 1},
		{"no version", said(`{"version":null}`), "", 2, 1},
		{"a list", said(`{"version":["3"]}`), "", 2, 1},
		{"long version", said(`{"version":"` + strings.Repeat("x", maxVersion+1) + `"}`), "", 2, 1},
		{"one pod is new", said(`{"version":"2"}`), "", 2, 2},
		{"another is not", said(`{"version":"1"}`), "", 2, 2},
		{"one pod is new", said(`{"version":"2"}`), "", 2, 2},
		{"all are", said(`{"version":"2"}`), "2", 2, 2},
		{"roll back", said(`{"version":"1","build":7}`), "", 2, 2},
		{"seen twice", said(`{"version":"1","build":7}`), "1", 2, 2},
		{"byte order mark", said("\ufeff" + `{"version":"3"}`), "", 2, 2},
		{"seen twice", said("\ufeff" + `{"version":"3"}`), "3", 2, 2},
		{"changelog null", said(`{"version":"4","changelog":null}`), "", 2, 2},
		{"changelog a list", said(`{"version":"4","changelog":["x"]}`), "4", 2, 2},
		{"changelog too long", said(`{"version":"5","changelog":"` + strings.Repeat("x", maxChangelog+1) + `"}`), "", 2, 2},
		{"changelog too long in JSON", said(`{"version":"5","changelog":"` + strings.Repeat("\u2028", maxChangelog/3) + `"}`), "5", 2, 2},
		{"a number", said(`{"version":1.10}`), "", 2, 2},
		{"a number", said(`{"version":1.10}`), "1.10", 2, 2},
		{"what was posted", said(`{"version":"posted"}`), "posted", 2, 2},
		{"is announced once", said(`{"version":"posted"}`), "", 2, 2},
	} {
		if tt.name == "what was posted" {
			api.checkAnnouncedToAll("posted", 1, 0)
		}
		answers <- tt.answer
		r := <-polls // so the last answer has been dealt with
		api.conns.Drain(t.Context())
		if tt.told != "" {
			story += " version:" + tt.told
		}
		if got := stream.story(); got != story {
			t.Fatalf("%s: got %s, want %s", tt.name, got, story)
		}
		log := api.logged.String()
		if got, again := strings.Count(log, failed), strings.Count(log, worksAgain); got != tt.errors || again != tt.recovered {
			t.Fatalf("%s: got %d errors and %d ends of them in the log, want %d and %d", tt.name, got, again, tt.errors, tt.recovered)
		}
		if h := r.Header; h.Get("If-None-Match")+h.Get("If-Modified-Since") != "" || h.Get("Cache-Control") != "no-cache" {
			t.Errorf("%s: got headers %v, want no condition and no-cache", tt.name, h)
		}
	}
	if got := stream.text(); !strings.Contains(got, `version {"version":"5"}`) || !strings.Contains(got, `version {"version":"1.10"}`) {
		t.Errorf("got\n%s\nwant no changelog, and the number as its text", got)
	}
	fresh := api.subscribe("fresh")
	api.conns.Drain(t.Context())
	fresh.checkStory("connection_open version:posted")
	stop()
	answers <- noHTTP
	<-stopped
	if log := api.logged.String(); strings.Contains(log, "hidden") {
		t.Errorf("the log has the query, which may be a secret:\n%s", log)
	}
}

// The log is looked up when the connection has been made. Before that, an announcement to everybody would not see the
// connection, and the log would lack it.
func TestVersionLookedUpConnected(t *testing.T) {
	t.Parallel()
	api := newAPI(t, "")
	done := make(chan error, 1)
	api.conns.mu.Lock()
	go func() {
		_, _, err := api.version.OnConnect("r", connectRequest{token: "a"})
		done <- err
	}()
	time.Sleep(20 * time.Millisecond) // too early a look has been by then, and a right one cannot be
	api.version.mu.Lock()
	early := len(api.version.streams)
	api.version.mu.Unlock()
	api.conns.mu.Unlock()
	if err := receive(t, done); err != nil || early != 0 {
		t.Errorf("got error %v and %d logs before the connection, want none", err, early)
	}
}
