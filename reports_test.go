package main

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"testing/iotest"
	"time"
)

// A longReport is a POST whose body goes on for as long as the test writes to it.
type longReport struct {
	t      *testing.T
	body   *io.PipeWriter
	answer chan string
}

func reportAtLength(t *testing.T, v visitor, id string) *longReport {
	t.Helper()
	read, write := io.Pipe()
	r := &longReport{t, write, make(chan string, 1)}
	t.Cleanup(func() { write.Close() })
	go func() {
		resp, err := v.client.Post(v.api+"/api/tasks/"+id+"/progress", "application/x-ndjson", read)
		if err != nil {
			r.answer <- err.Error()
			return
		}
		defer resp.Body.Close()
		text, _ := io.ReadAll(resp.Body)
		r.answer <- fmt.Sprintf("%d %s", resp.StatusCode, strings.TrimSpace(string(text)))
	}()
	return r
}

func (r *longReport) say(lines string) {
	r.t.Helper()
	if _, err := io.WriteString(r.body, lines); err != nil {
		r.t.Error(err)
	}
}

func (r *longReport) want(want string) {
	r.t.Helper()
	if got := receive(r.t, r.answer); !strings.HasPrefix(got, want) {
		r.t.Errorf("got %s, want %s", got, want)
	}
}

// Each line of a long body is taken as a report when it comes. The answer comes at the end of the body.
func TestReports(t *testing.T) {
	t.Parallel()
	backend := startBackend(t, "DATA_DIR="+t.TempDir(), "TASK_TIMEOUT_SECONDS=3")
	v := newVisitor(t, backend.URL, backend.URL)
	id := v.start("external", "{}")
	es := v.follow(id)
	waitOpen(t, es)
	r := reportAtLength(t, v, id)
	r.say(`{"text":"one","value":0.1,"seq":1}` + "\n")
	wantStory(t, es, "task_started", "progress_update one")
	r.say("\r\n  \n" + `{"text":"two"`)
	time.Sleep(20 * time.Millisecond)
	r.say(`,"seq":2}` + "\r\n" + `{"text":"again","seq":2}` + "\n" + `{"text":"three"}`)
	r.body.Close()
	wantStory(t, es, "task_started", "progress_update one", "progress_update two", "progress_update three")
	epoch, _, _ := strings.Cut(es.events()[0].ID, "-")
	r.want(`200 {"event_id":"` + epoch + `-4","reports":4}`)

	post := func(id, body, want string) {
		t.Helper()
		r := reportAtLength(t, v, id)
		r.say(body)
		r.body.Close()
		r.want(want)
	}
	post(id, "", `200 {"event_id":"`+epoch+`-4","reports":0}`)
	post(id, `{"text":"four"}`+"\n\n"+`{"value":2}`+"\n"+`{"text":"never"}`+"\n",
		`400 {"error":"value must be a number from 0 to 1","code":"bad_value","line":3}`)
	post(id, `{"text":"five"}`+"\n"+"[]\n", `400 {"error":"body must be one JSON object","code":"not_json","line":2}`)
	post(id, "\v"+`{"text":"six"}`, `400 {"error":"body must be one JSON object","code":"not_json","line":1}`)
	post(id, `{"text":"`+strings.Repeat("x", 256<<10)+`"}`, `413 {"error":"request body too large","code":"too_large","line":1}`)
	long := `{"text":"` + strings.Repeat("x", 256<<10-11) + `"}` // the most that a line may have
	post(id, long+"\r\n"+long, `200 {"event_id":"`+epoch+`-8","reports":2}`)
	post(id, "\n"+strings.Replace(long, "x", "xx", 1), `413 {"error":"request body too large","code":"too_large","line":2}`)
	post("unknown", `{"text":"x"}`, `404 {"error":"task not found","code":"task_not_found"}`)
	post(v.start("demo", `{"delay":60}`), `{"text":"x"}`, `409 {"error":"task is not external","code":"not_external","status":"running"}`)
	wantStory(t, es, "task_started", "progress_update one", "progress_update two", "progress_update three",
		"progress_update four", "progress_update five")
	for _, wrong := range []struct{ id, say, want string }{
		{id, "nope\n", `400 {"error":"body must be one JSON object","code":"not_json","line":1}`},
		{"unknown", `{"text":"x"}` + "\n", `404 {"error":"task not found","code":"task_not_found"}`},
		{"a/b", `{"text":"x"}` + "\n", `404 {"error":"not found","code":"not_found"}`},
		{"%61", `{"text":"x"}` + "\n", `400 {"error":"path must be clean and without escapes","code":"bad_path"}`},
	} { // at once, although the body goes on
		r := reportAtLength(t, v, wrong.id)
		r.say(wrong.say)
		r.want(wrong.want)
	}

	// As long as reports keep coming, the task and the body live longer than the timeout.
	r = reportAtLength(t, v, id)
	for n := range 5 {
		r.say(fmt.Sprintf(`{"text":"slow %d"}`+"\n", n))
		time.Sleep(time.Second)
	}
	r.say(`{"half of`) // not an error of the worker
	v.wantPost("/api/tasks/"+id+"/cancel", "", `200 {"success":true,"message":"task cancelled"}`)
	r.want(`409 {"error":"task cancelled","code":"task_cancelled","status":"cancelled"}`) // at once, with no more lines
	post(id, `{"text":"x","seq":2}`, `200 {"event_id":"`+epoch+`-14","reports":1}`)
	post(id, `{"text":"x"}`, `409 {"error":"task cancelled","code":"task_cancelled","status":"cancelled"}`)

	// A worker that falls silent is given up like any other.
	id = v.start("external", "{}")
	r = reportAtLength(t, v, id)
	r.say(`{"text":"last words"}` + "\n")
	r.want(`409 {"error":"task is finished","code":"task_finished","status":"failed"}`)
}

// lines returns the body of a worker that may take its time.
func lines(body io.Reader) *lineReader {
	control := http.NewResponseController(httptest.NewRecorder())
	return &lineReader{body: body, ctx: context.Background(), timeout: time.Minute, control: control}
}

// The whole lines of a body that breaks off count, also those that come with its end.
func TestReportsCutOff(t *testing.T) {
	t.Parallel()
	api := newAPI(t, "")
	api.do("POST", "/api/tasks", `{"type":"external","params":{"task_id":"a"}}`)
	said := strings.NewReader(`{"text":"one"}` + "\n" + `{"text":"two"}` + "\n" + `{"text":"half of a line"}`)
	body := iotest.DataErrReader(io.MultiReader(said, iotest.ErrReader(io.ErrUnexpectedEOF)))
	if _, err := api.tasks.takeLines(api.tasks.task("a"), lines(body)); err != errBrokenOff {
		t.Errorf("got %v, want %v", err, errBrokenOff)
	}
	if got := api.do("GET", "/api/tasks/a/status", ""); !strings.Contains(got, `"text":"two"`) {
		t.Errorf("the last whole line is not there: %s", got)
	}
}

// A long body is about the task that it began with, not about a later task with the same task_id.
func TestReportsOfAnEarlierTask(t *testing.T) {
	t.Parallel()
	api := newAPI(t, "")
	api.external("a")
	read, write := io.Pipe()
	failed := make(chan error)
	go func() {
		_, err := api.tasks.takeLines(api.tasks.task("a"), lines(read))
		failed <- err
	}()
	io.WriteString(write, `{"text":"one"}`+"\n")
	eventually(t, soon, "the report is taken", func() bool {
		return strings.Contains(api.do("GET", "/api/tasks/a/events", ""), `"one"`)
	})
	api.succeed("a")
	io.WriteString(write, `{"text":"two"}`+"\n")
	if err := receive(t, failed); err != errTaskUnknown {
		t.Errorf("got %v, want %v", err, errTaskUnknown)
	}
	if got := api.do("GET", "/api/tasks/a/events", ""); strings.Contains(got, `"two"`) {
		t.Errorf("the later task got the report: %s", got)
	}
}

// The reports of a long body that came before a shutdown count, and the worker is told how many they are. The task goes
// on with the next backend.
func TestReportsDuringShutdown(t *testing.T) {
	t.Parallel()
	backend := startBackend(t, "DATA_DIR="+t.TempDir())
	v := newVisitor(t, backend.URL, backend.URL)
	id := v.start("external", "{}")
	r := reportAtLength(t, v, id)
	r.say(`{"text":"one"}` + "\n" + `{"text":"two"}` + "\n")
	eventually(t, soon, "the reports are taken", func() bool {
		return strings.Contains(v.getText("/api/tasks/"+id+"/events"), `"two"`)
	})
	backend.wantStop(t)
	r.want(`503 {"error":"shutting down","code":"shutting_down","reports":2}`)
	must(t, backend.start())
	r = reportAtLength(t, v, id)
	for n := range 5000 {
		r.say(fmt.Sprintf(`{"text":"report %d","seq":%d}`+"\n", n, n+1))
	}
	r.body.Close()
	answer := receive(t, r.answer)
	backend.restart(t)
	if !strings.Contains(answer, `-5003","reports":5000}`) {
		t.Errorf("got %s", answer)
	}
	es := v.follow(id)
	v.complete(id)
	if got := story(es.waitFor(t, soon, completed)); !slices.Contains(got, "progress_update report 4999") {
		t.Errorf("the last report is not among %d events", len(got))
	}
}
