"""The URLs of the two views."""

from django.urls import path
from questions import views

urlpatterns = [path("questions/", views.ask), path("questions/<int:question_id>/", views.show)]
