// What the API shows of tasks, and its handlers: limits, reading, answers. What they decide on is in tasks.go; the
// reports of external tasks are in external.go.

package main

import (
	"cmp"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"time"
)

// taskView is a task as the API shows it. Most members are null until they are known.
type taskView struct {
	TaskID    string           `json:"task_id"`
	Type      string           `json:"type"`
	Status    taskStatus       `json:"status"`
	Title     *string          `json:"title"`
	Progress  *taskProgress    `json:"progress"`
	StartTime *time.Time       `json:"start_time"`
	EndTime   *time.Time       `json:"end_time"`
	Result    *json.RawMessage `json:"result"`
	Error     *string          `json:"error"`
}

// view returns what is on disk of t, or errTaskUnknown if nothing is or t is nil.
func (t *task) view() (taskView, error) {
	if t == nil || t.shown.Load() == nil {
		return taskView{}, errTaskUnknown
	}
	s := *t.shown.Load()
	return taskView{
		TaskID:    t.id,
		Type:      t.kind,
		Status:    s.status,
		Title:     orNull(t.title, t.title != ""),
		Progress:  s.progress,
		StartTime: orNull(s.start.UTC(), !s.start.IsZero()),
		EndTime:   orNull(s.end.UTC(), !s.end.IsZero()),
		Result:    orNull(json.RawMessage(s.result), s.result != ""),
		Error:     orNull(s.err, s.status == taskFailed),
	}, nil
}

// orNull returns a pointer to value, or nil (null in JSON) if there is none.
func orNull[T any](value T, there bool) *T {
	if !there {
		return nil
	}
	return &value
}

// List returns the newest tasks, newest first.
func (s *TaskService) List() []taskView {
	s.mu.Lock()
	tasks := slices.SortedFunc(maps.Values(s.tasks), func(a, b *task) int { return cmp.Compare(b.number, a.number) })
	s.mu.Unlock()
	views := []taskView{}
	for _, t := range tasks[:min(len(tasks), maxTaskList)] {
		if v, err := t.view(); err == nil {
			views = append(views, v)
		}
	}
	return views
}

// Counts returns how many tasks have each status.
func (s *TaskService) Counts() map[string]float64 {
	n := map[string]float64{}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, t := range s.tasks {
		n[string(t.status)]++
	}
	return n
}

// serveStart is POST /api/tasks.
func (s *TaskService) serveStart(w http.ResponseWriter, r *http.Request) (status int, answer any, err error) {
	body, err := readJSON(w, r, maxTaskBody)
	kind, _, bad := body.str("type")
	if err := cmp.Or(err, bad); err != nil {
		return 0, nil, err
	}
	if kind == "" {
		return 0, nil, errMissingField
	}
	params := object{}
	if raw, ok := body["params"]; ok {
		if params, err = parseObject(raw); err == errNotJSON {
			err = badParam("params must be an object")
		}
		if err != nil {
			return 0, nil, err
		}
	}
	t, known, err := s.Start(kind, params)
	if err != nil {
		return 0, nil, err
	}
	stored := t.lastStored.Load().wait()
	view, err := t.view()
	if err = cmp.Or(stored, err); err != nil {
		return 0, nil, err
	}
	streamURL := "/api/sse/tasks?task_id=" + url.QueryEscape(t.id)
	if known {
		return http.StatusOK, struct {
			taskView
			StreamURL string `json:"stream_url"`
		}{view, streamURL}, nil
	}
	return http.StatusAccepted, map[string]any{"task_id": t.id, "stream_url": streamURL, "status": view.Status}, nil
}

// serveList is GET /api/tasks.
func (s *TaskService) serveList(w http.ResponseWriter, r *http.Request) (status int, answer any, err error) {
	return http.StatusOK, map[string]any{"tasks": s.List()}, nil
}

// serveStatus is GET /api/tasks/{task_id}/status.
func (s *TaskService) serveStatus(w http.ResponseWriter, r *http.Request) (status int, answer any, err error) {
	answer, err = s.task(r.PathValue("task_id")).view()
	return http.StatusOK, answer, err
}

// serveEvents is GET /api/tasks/{task_id}/events. It writes one event after the other, as all of them may be large.
func (s *TaskService) serveEvents(w http.ResponseWriter, r *http.Request) {
	t := s.task(r.PathValue("task_id"))
	view, err := t.view() // first, so that events that fit in one answer are all if it is a finished task
	if err != nil {
		writeError(w, r, err)
		return
	}
	w.Header().Set("Content-Type", jsonType)
	comma := ""
	fmt.Fprint(w, `{"events":[`)
	for _, e := range t.events.After(r.URL.Query().Get("after"), maxHistory) {
		fmt.Fprintf(w, `%s{"id":%q,"data":%s}`, comma, e.ID, e.Data)
		comma = ","
	}
	fmt.Fprintf(w, "],\"status\":%q}\n", view.Status)
}

// serveCancel is POST /api/tasks/{task_id}/cancel.
func (s *TaskService) serveCancel(w http.ResponseWriter, r *http.Request) (status int, answer any, err error) {
	return http.StatusOK, success{true, "task cancelled"}, s.Cancel(r.PathValue("task_id"))
}

// serveDelete is DELETE /api/tasks/{task_id}.
func (s *TaskService) serveDelete(w http.ResponseWriter, r *http.Request) (status int, answer any, err error) {
	return http.StatusOK, success{true, "task deleted"}, s.Delete(r.PathValue("task_id"))
}

type success struct {
	Success bool   `json:"success"`
	Message string `json:"message"`
}
